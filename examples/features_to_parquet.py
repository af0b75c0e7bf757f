"""Features of a folder of images as a Parquet file with columns of your own, in batches: memory does not grow.

    python examples/features_to_parquet.py bundles/visible photos --out features.parquet

`mae-deploy predict BUNDLE photos --out features.parquet` does this without a program; this one shows where to put
columns that only you know. Needs pyarrow: pip install 'mae-deploy[parquet]'.
"""

import argparse
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from mae_deploy.images.find import find_images
from mae_deploy.runtime import Backbone
from mae_deploy.runtime.predict import Predictions


def main(arguments: list[str] | None = None) -> None:
    """Write the file, and name what could not be read."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("photos", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batch-size", type=int, default=32)
    given = parser.parse_args(arguments)

    paths = find_images(given.photos)
    with Backbone.load(given.bundle) as backbone:
        width = backbone.bundle.model["embed_dim"]
        schema = pa.schema(
            {"path": pa.string(), "folder": pa.string(), "bytes": pa.int64(), "pooled": pa.list_(pa.float32(), width)}
        )
        predictions = Predictions(backbone, paths, batch_size=given.batch_size, outputs=["pooled"])
        with pq.ParquetWriter(given.out, schema, compression="zstd") as writer:
            for batch, features in predictions:
                pooled = pa.FixedSizeListArray.from_arrays(features.pooled.astype("float32").ravel(), width)
                columns = {
                    "path": [str(path) for path in batch],
                    "folder": [path.parent.name for path in batch],
                    "bytes": [path.stat().st_size for path in batch],
                    "pooled": pooled,
                }
                writer.write_table(pa.table(columns, schema=schema))
        for bad in predictions.unreadable:
            print(f"left out: {bad.path}: {bad.reason}")
    print(f"{given.out}: {pq.read_metadata(given.out).num_rows} of {len(paths)} images")


if __name__ == "__main__":
    main()

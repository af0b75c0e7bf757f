"""A service that answers from several threads with one copy of the weights, on the standard library's server.

    python examples/service.py bundles/classifier --port 8000
    curl --data-binary @photo.jpg http://127.0.0.1:8000/

A classifier answers with its best classes, any other bundle with its pooled features.
"""

import argparse
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from mae_deploy.errors import MaeDeployError
from mae_deploy.images.read import UnreadableImage
from mae_deploy.runtime import Backbone
from mae_deploy.runtime.backbone import Features

MOST_BYTES = 20_000_000


def server(backbone: Backbone, port: int) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            try:
                features = backbone(backbone.read(self.rfile.read(min(length, MOST_BYTES))))
                status, data = 200, answer(backbone, features)
            except (MaeDeployError, UnreadableImage) as error:
                status, data = 400, {"error": str(error)}
            body = json.dumps(data).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


def answer(backbone: Backbone, features: Features) -> dict[str, Any]:
    names = backbone.bundle.class_names
    if names is None:
        return {"pooled": features.pooled[0].tolist()}
    return {"classes": [names[index] for index in features.logits[0].argsort()[::-1][:5]]}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--port", type=int, default=8000)
    given = parser.parse_args(arguments)
    with Backbone.load(given.bundle, threads=1) as backbone, server(backbone, given.port) as serving:
        print(f"http://127.0.0.1:{serving.server_address[1]}/")
        serving.serve_forever()


if __name__ == "__main__":
    main()

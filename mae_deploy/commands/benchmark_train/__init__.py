"""`mae-deploy benchmark-train`, for developers: a pretraining step against a plain one."""

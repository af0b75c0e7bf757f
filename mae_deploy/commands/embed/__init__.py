"""`mae-deploy embed`: features of whole collections."""

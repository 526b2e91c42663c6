"""`tokenwire bench`: measures a running server as its users see it.

Target -> Transport (REST or gRPC) -> prompts -> load (open or closed) -> Samples -> Summary ->
Report. Nothing here knows the server's inside; whatever speaks TGI's REST API can be measured.
"""

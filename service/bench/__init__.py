"""`tokenwire bench`: measures a running server as its users see it.

Target -> Transport (REST or gRPC) -> prompts -> load (open or closed) -> Samples -> Summary ->
Report. It uses the public API alone, so any server with TGI's REST API can be measured.
"""

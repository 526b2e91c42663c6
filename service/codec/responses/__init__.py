"""The Responses API on the wire: its requests, which become chats, and its replies."""

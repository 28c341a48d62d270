"""The server: requests in, tokens out, ranks that may die in between.

>>> from serving import Client, Server
"""

from serving.app import Server
from serving.client import AsyncClient, Client

__all__ = ["AsyncClient", "Client", "Server"]

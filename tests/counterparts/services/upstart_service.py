"""The Python service of upstart-socket-bridge users: UPSTART_FDS names the listening socket. One client, then exit."""

import os
import socket

listener = socket.fromfd(int(os.environ["UPSTART_FDS"]), socket.AF_INET, socket.SOCK_STREAM)
connection, _ = listener.accept()
words = (os.environ["UPSTART_FDS"], os.environ.get("UPSTART_EVENTS", "-"), os.environ.get("LISTEN_FDS", "-"))
connection.sendall(f"python {' '.join(words)}\n".encode())
connection.close()

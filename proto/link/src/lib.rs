//! QUIC links between the parts: mutual TLS, identity and roles, framed streams.

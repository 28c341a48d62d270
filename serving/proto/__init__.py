"""The wire contract: .proto files and the stubs generated from them by scripts/protos."""

//! Outrigger's expert server.

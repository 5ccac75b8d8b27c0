//! Outrigger's wire: messages, services and activation encodings.

//! TODO-owner

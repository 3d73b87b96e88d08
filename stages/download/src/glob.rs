//! Patterns for files of a repository, as Hugging Face reads them: `*` matches `/` too.

use globset::{Glob, GlobSet, GlobSetBuilder};

/// A pattern that does not parse.
#[derive(Debug, thiserror::Error)]
#[error("`{pattern}` is not a pattern: {reason}")]
pub(crate) struct PatternError {
    pattern: String,
    reason: String,
}

/// Several patterns, each told apart.
pub(crate) struct Patterns {
    texts: Vec<String>,
    set: GlobSet,
}

impl Patterns {
    /// Compiles the patterns.
    ///
    /// # Errors
    /// [`PatternError`] for the first that does not parse.
    pub(crate) fn new(texts: &[String]) -> Result<Self, PatternError> {
        let mut builder = GlobSetBuilder::new();
        for text in texts {
            let glob = Glob::new(text).map_err(|error| PatternError {
                pattern: text.clone(),
                reason: error.kind().to_string(),
            })?;
            builder.add(glob);
        }
        let set = builder.build().map_err(|error| PatternError {
            pattern: texts.join(", "),
            reason: error.kind().to_string(),
        })?;
        Ok(Self { texts: texts.to_vec(), set })
    }

    /// Whether any pattern matches.
    pub(crate) fn matches(&self, name: &str) -> bool {
        self.set.is_match(name)
    }

    /// The first pattern that matches none of `names`.
    pub(crate) fn first_without_match(&self, names: &[String]) -> Option<&str> {
        let mut used = vec![false; self.texts.len()];
        for name in names {
            for index in self.set.matches(name) {
                used[index] = true;
            }
        }
        used.iter().position(|is_used| !is_used).map(|index| self.texts[index].as_str())
    }
}

/// Whether a pattern can only match the file of exactly that name.
pub(crate) fn is_literal(pattern: &str) -> bool {
    !pattern.contains(['*', '?', '[', ']', '{', '}', '\\'])
}

//! Names in the output tree, and names near a wrong one.
//!
//! A name comes from a remote listing or a user; only [`is_tree_name`] keeps it inside the tree.

/// Whether `name` is a relative path that stays inside the tree: plain segments joined by `/`.
pub(crate) fn is_tree_name(name: &str) -> bool {
    !name.contains(['\\', '\0'])
        && name.split('/').all(|segment| !matches!(segment, "" | "." | ".."))
}

/// The last segment of a path.
pub(crate) fn base_name(path: &str) -> &str {
    let trimmed = path.trim_end_matches('/');
    trimmed.rsplit('/').next().unwrap_or(trimmed)
}

/// Up to three of `names` that read most like `wanted`, best first. A name in another folder
/// counts by its base name.
pub(crate) fn near<'a>(wanted: &str, names: impl IntoIterator<Item = &'a str>) -> Vec<&'a str> {
    const ALIKE: f64 = 0.7;
    let alike = |name: &str| {
        let whole = strsim::normalized_damerau_levenshtein(wanted, name);
        let base = strsim::normalized_damerau_levenshtein(base_name(wanted), base_name(name));
        whole.max(base)
    };
    let mut scored: Vec<(f64, &str)> = names
        .into_iter()
        .map(|name| (alike(name), name))
        .filter(|(score, _)| *score >= ALIKE)
        .collect();
    scored.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(b.1)));
    scored.into_iter().take(3).map(|(_, name)| name).collect()
}

/// A hint: the near names if there are any, else the first few of all.
pub(crate) fn hint(wanted: &str, names: &[String]) -> String {
    let near = near(wanted, names.iter().map(String::as_str));
    if !near.is_empty() {
        return format!("did you mean `{}`?", near.join("` or `"));
    }
    if names.is_empty() {
        return "it holds no file at all".to_owned();
    }
    let shown: Vec<&str> = names.iter().take(8).map(String::as_str).collect();
    let more = names.len().saturating_sub(shown.len());
    let tail = if more > 0 { format!(" and {more} more") } else { String::new() };
    format!("it holds `{}`{tail}", shown.join("`, `"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_never_leaves_the_tree() {
        for bad in ["", "/etc/passwd", "../x", "a/../b", "a//b", "a\\b", "./a"] {
            assert!(!is_tree_name(bad), "{bad}");
        }
        assert!(is_tree_name("a/b.json"));
    }

    #[test]
    fn a_slip_of_the_pen_is_near_and_a_stranger_is_not() {
        let names = ["config.json", "model.safetensors"];
        assert_eq!(near("modle.safetensors", names), ["model.safetensors"]);
        assert!(near("weights.gguf", names).is_empty());
    }
}

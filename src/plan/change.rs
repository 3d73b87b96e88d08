//! Two values beside each other: of long ones the part in which they differ.

use serde_json::Value;

/// At most this many characters of a value are shown.
const SHOWN: usize = 60;
/// So many of them stand before the first difference.
const BEFORE: usize = 12;

/// Both values as text, `none` for an absent one.
pub(crate) fn beside(old: Option<&Value>, new: Option<&Value>, none: &str) -> (String, String) {
    let text = |value: Option<&Value>| value.map_or_else(|| none.to_owned(), Value::to_string);
    let (old, new) = (text(old), text(new));
    let same = old.chars().zip(new.chars()).take_while(|(a, b)| a == b).count();
    let longest = old.chars().count().max(new.chars().count());
    let from = if longest <= SHOWN { 0 } else { same.saturating_sub(BEFORE) };
    (part(&old, from), part(&new, from))
}

fn part(text: &str, from: usize) -> String {
    let mut rest = text.chars().skip(from);
    let mut part = if from > 0 { "…".to_owned() } else { String::new() };
    part.extend(rest.by_ref().take(SHOWN));
    if rest.next().is_some() {
        part.push('…');
    }
    part
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn long_values_show_where_they_differ() {
        let long = "x".repeat(100);
        let (old, new) = (json!(format!("{long} seq 3 > out")), json!(format!("{long} seq 4")));
        let (old, new) = beside(Some(&old), Some(&new), "-");
        assert_eq!(old, "…xxxxxxx seq 3 > out\"");
        assert_eq!(new, "…xxxxxxx seq 4\"");
        let (old, new) = beside(None, Some(&json!(long)), "-");
        assert_eq!((old.as_str(), new.chars().count()), ("-", SHOWN + 1));
        assert_eq!(beside(Some(&json!(1)), Some(&json!(2)), "-"), ("1".into(), "2".into()));
    }
}

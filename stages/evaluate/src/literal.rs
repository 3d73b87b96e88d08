//! Reads JSON as models write it, for the lenient parser only.
//!
//! Accepts JSON and no more than this beside it: single-quoted strings, Python's `True`, `False`,
//! `None` and tuples, a comma before a closing bracket, and line breaks inside strings. Nothing is
//! ever completed: text that stops early is not a value.

use serde_json::{Map, Number, Value};

/// Deepest nesting that is read.
const MAX_DEPTH: usize = 64;

/// A position in a text.
#[derive(Clone, Copy)]
pub(crate) struct Cursor<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Cursor<'a> {
    /// A cursor at byte `at`, which is a character boundary.
    pub(crate) fn new(text: &'a str, at: usize) -> Self {
        Self { text, at }
    }

    /// Byte position.
    pub(crate) fn at(&self) -> usize {
        self.at
    }

    /// Text from here on.
    pub(crate) fn rest(&self) -> &'a str {
        &self.text[self.at..]
    }

    fn peek(&self) -> Option<char> {
        self.rest().chars().next()
    }

    fn next(&mut self) -> Option<char> {
        let next = self.peek()?;
        self.at += next.len_utf8();
        Some(next)
    }

    /// Skips white space.
    pub(crate) fn skip_space(&mut self) {
        self.at += self.rest().len() - self.rest().trim_start().len();
    }

    /// Skips white space, then takes `wanted` if it is next.
    pub(crate) fn take(&mut self, wanted: char) -> bool {
        self.skip_space();
        let found = self.peek() == Some(wanted);
        if found {
            self.at += wanted.len_utf8();
        }
        found
    }

    /// Takes a name of letters, digits, `_` and `.`; empty where there is none.
    pub(crate) fn name(&mut self) -> &'a str {
        let rest = self.rest();
        let is_part = |c: char| c.is_alphanumeric() || matches!(c, '_' | '.');
        let end = rest.find(|c| !is_part(c)).unwrap_or(rest.len());
        self.at += end;
        &rest[..end]
    }

    /// Reads one value.
    pub(crate) fn value(&mut self) -> Option<Value> {
        self.value_at(0)
    }

    fn value_at(&mut self, depth: usize) -> Option<Value> {
        if depth > MAX_DEPTH {
            return None;
        }
        self.skip_space();
        match self.peek()? {
            '{' => self.object(depth).map(Value::Object),
            '[' => self.array(']', depth),
            '(' => self.array(')', depth),
            '\'' => self.quoted_object(depth).or_else(|| self.string().map(Value::String)),
            '"' => self.string().map(Value::String),
            c if c.is_ascii_digit() || matches!(c, '-' | '+' | '.') => self.number(),
            _ => self.word(),
        }
    }

    fn object(&mut self, depth: usize) -> Option<Map<String, Value>> {
        let mut map = Map::new();
        self.take('{').then_some(())?;
        loop {
            if self.take('}') {
                return Some(map);
            }
            self.skip_space();
            let key = self.string()?;
            self.take(':').then_some(())?;
            map.insert(key, self.value_at(depth + 1)?);
            if !self.take(',') {
                return self.take('}').then_some(map);
            }
        }
    }

    fn array(&mut self, close: char, depth: usize) -> Option<Value> {
        let mut items = Vec::new();
        self.next()?;
        loop {
            if self.take(close) {
                return Some(Value::Array(items));
            }
            items.push(self.value_at(depth + 1)?);
            if !self.take(',') {
                return self.take(close).then_some(Value::Array(items));
            }
        }
    }

    /// `'{…}'`: an object written as a string whose apostrophes are not escaped, as in Glaive.
    fn quoted_object(&mut self, depth: usize) -> Option<Value> {
        let start = *self;
        self.next()?;
        let object = if self.peek() == Some('{') { self.object(depth + 1) } else { None };
        if object.is_some() && self.take('\'') {
            return object.map(Value::Object);
        }
        *self = start;
        None
    }

    fn string(&mut self) -> Option<String> {
        let quote = self.next().filter(|c| matches!(c, '"' | '\''))?;
        let mut text = String::new();
        loop {
            match self.next()? {
                '\\' => self.escape(&mut text)?,
                c if c == quote => return Some(text),
                c => text.push(c),
            }
        }
    }

    fn escape(&mut self, text: &mut String) -> Option<()> {
        match self.next()? {
            'n' => text.push('\n'),
            't' => text.push('\t'),
            'r' => text.push('\r'),
            'b' => text.push('\u{8}'),
            'f' => text.push('\u{c}'),
            'u' => text.push(self.unicode()?),
            c => text.push(c),
        }
        Some(())
    }

    /// The character of `XXXX`, or of a surrogate pair `XXXX\uXXXX`.
    fn unicode(&mut self) -> Option<char> {
        let high = self.hex4()?;
        if !(0xD800..0xDC00).contains(&high) {
            return char::from_u32(high);
        }
        (self.next()? == '\\' && self.next()? == 'u').then_some(())?;
        let low = self.hex4()?.checked_sub(0xDC00)?;
        char::from_u32(0x10000 + ((high - 0xD800) << 10) + low)
    }

    fn hex4(&mut self) -> Option<u32> {
        (0..4).try_fold(0, |value, _| Some(value * 16 + self.next()?.to_digit(16)?))
    }

    fn number(&mut self) -> Option<Value> {
        let rest = self.rest();
        let is_part = |c: char| c.is_ascii_digit() || matches!(c, '-' | '+' | '.' | 'e' | 'E');
        let end = rest.find(|c| !is_part(c)).unwrap_or(rest.len());
        let text = &rest[..end];
        self.at += end;
        let whole = text.parse::<i64>().ok().map(Number::from);
        whole.or_else(|| text.parse::<f64>().ok().and_then(Number::from_f64)).map(Value::Number)
    }

    fn word(&mut self) -> Option<Value> {
        match self.name() {
            "true" | "True" => Some(Value::Bool(true)),
            "false" | "False" => Some(Value::Bool(false)),
            "null" | "None" => Some(Value::Null),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(text: &str) -> Option<Value> {
        Cursor::new(text, 0).value()
    }

    #[test]
    fn json_and_its_documented_variants_are_read() {
        let cases = [
            (r#"{"a": [1, -2.5, 1e3], "b": null}"#, json!({"a": [1, -2.5, 1000.0], "b": null})),
            ("{'a': 'it\\'s', 'b': True,}", json!({"a": "it's", "b": true})),
            ("(1, None)", json!([1, null])),
            (r#""\u00e9\ud83d\ude00\n""#, json!("é😀\n")),
            (r#"{"q": '{"city": "L'Aquila"}'}"#, json!({"q": {"city": "L'Aquila"}})),
            ("'{not json'", json!("{not json")),
            ("\"two\nlines\"", json!("two\nlines")),
        ];
        for (text, value) in cases {
            assert_eq!(read(text), Some(value), "{text}");
        }
    }

    #[test]
    fn text_that_stops_early_is_not_a_value() {
        for text in ["{", "{\"a\": 1", "[1, 2", "\"abc", "{\"a\" 1}", "nul", "-", "\"\\ud83d\""] {
            assert_eq!(read(text), None, "{text}");
        }
    }

    #[test]
    fn deep_nesting_is_refused_not_followed() {
        assert_eq!(read(&"[".repeat(100_000)), None);
    }
}

//! A report as blocks, rendered to HTML and to Markdown from one source, so that both hold the same
//! numbers.

/// One block.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Block {
    /// Section heading.
    Heading(String),
    /// Paragraph.
    Text(String),
    /// The one sentence that sums the report up.
    Headline(String),
    /// Table; the first column is text, the others are numbers where `numeric`. One row may stand out.
    Table { head: Vec<String>, rows: Vec<Vec<String>>, numeric: bool, marked: Option<usize> },
    /// Drawing for HTML; Markdown gets the caption alone.
    Figure { svg: String, caption: String },
    /// Texts side by side under a heading: what somebody said.
    Example { title: String, parts: Vec<(String, String)> },
    /// Lines to type.
    Code(String),
    /// Another block, which HTML shows once its title is clicked.
    Folded(String, Box<Self>),
}

impl Block {
    pub(crate) fn table(head: &[&str], rows: Vec<Vec<String>>, numeric: bool) -> Self {
        let head = head.iter().map(|h| (*h).to_owned()).collect();
        Self::Table { head, rows, numeric, marked: None }
    }
}

/// Markdown of a whole report.
pub(crate) fn markdown(title: &str, blocks: &[Block]) -> String {
    let mut out = format!("# {}\n", one_line(title));
    for block in blocks {
        out.push('\n');
        markdown_block(block, &mut out);
    }
    out
}

fn markdown_block(block: &Block, out: &mut String) {
    match block {
        Block::Heading(text) => out.push_str(&format!("## {}\n", one_line(text))),
        Block::Text(text) => out.push_str(&format!("{}\n", one_line(text))),
        Block::Headline(text) => out.push_str(&format!("**{}**\n", one_line(text))),
        Block::Figure { caption, .. } => out.push_str(&format!("*{}*\n", one_line(caption))),
        Block::Code(text) => out.push_str(&fenced(text)),
        Block::Folded(_, inside) => markdown_block(inside, out),
        Block::Table { head, rows, numeric, marked } => {
            out.push_str(&format!("| {} |\n", cells(head)));
            let rule = if *numeric { "---:" } else { "---" };
            let rules = (0..head.len()).map(|i| if i == 0 { "---" } else { rule });
            out.push_str(&format!("| {} |\n", rules.collect::<Vec<_>>().join(" | ")));
            for (i, row) in rows.iter().enumerate() {
                let cells = if *marked == Some(i) { bold(row) } else { cells(row) };
                out.push_str(&format!("| {cells} |\n"));
            }
        }
        Block::Example { title, parts } => {
            out.push_str(&format!("**{}**\n", one_line(title)));
            for (label, text) in parts {
                out.push_str(&format!("\n{}:\n\n{}", one_line(label), fenced(text)));
            }
        }
    }
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn cells(row: &[String]) -> String {
    row.iter().map(|c| one_line(c).replace('|', "\\|")).collect::<Vec<_>>().join(" | ")
}

fn bold(row: &[String]) -> String {
    let marked = |c: &String| if c.is_empty() { String::new() } else { format!("**{c}**") };
    cells(&row.iter().map(marked).collect::<Vec<_>>())
}

/// A code block whose fence is longer than any run of backticks inside.
fn fenced(text: &str) -> String {
    let longest = text.split(|c| c != '`').map(str::len).max().unwrap_or(0);
    let fence = "`".repeat(longest.max(2) + 1);
    format!("{fence}text\n{}\n{fence}\n", text.trim_end())
}

/// HTML of a whole report: one file, nothing fetched.
pub(crate) fn html(title: &str, blocks: &[Block]) -> String {
    let title = escape(title);
    let mut out = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{title}</h1>\n"
    );
    for block in blocks {
        html_block(block, &mut out);
    }
    out.push_str("</main>\n</body>\n</html>\n");
    out
}

fn html_block(block: &Block, out: &mut String) {
    match block {
        Block::Heading(text) => out.push_str(&format!("<h2>{}</h2>\n", escape(text))),
        Block::Folded(title, inside) => {
            out.push_str(&format!("<details><summary>{}</summary>\n", escape(title)));
            html_block(inside, out);
            out.push_str("</details>\n");
        }
        Block::Text(text) => out.push_str(&format!("<p>{}</p>\n", escape(text))),
        Block::Headline(text) => {
            out.push_str(&format!("<p class=\"headline\">{}</p>\n", escape(text)));
        }
        Block::Figure { svg, caption } => out.push_str(&format!(
            "<figure>{svg}<figcaption>{}</figcaption></figure>\n",
            escape(caption)
        )),
        Block::Code(text) => out.push_str(&format!("<pre>{}</pre>\n", escape(text))),
        Block::Table { head, rows, numeric, marked } => {
            html_table(head, rows, *numeric, *marked, out);
        }
        Block::Example { title, parts } => {
            out.push_str(&format!(
                "<section class=\"example\"><h3>{}</h3>\n<div class=\"parts\">",
                escape(title)
            ));
            for (label, text) in parts {
                let (label, text) = (escape(label), escape(text));
                out.push_str(&format!("<div><h4>{label}</h4><pre>{text}</pre></div>"));
            }
            out.push_str("</div></section>\n");
        }
    }
}

fn html_table(
    head: &[String],
    rows: &[Vec<String>],
    numeric: bool,
    marked: Option<usize>,
    out: &mut String,
) {
    let class = if numeric { " class=\"numeric\"" } else { "" };
    out.push_str(&format!("<div class=\"scroll\"><table{class}>\n<thead><tr>"));
    for cell in head {
        out.push_str(&format!("<th>{}</th>", escape(cell)));
    }
    out.push_str("</tr></thead>\n<tbody>\n");
    for (i, row) in rows.iter().enumerate() {
        let cells: String = row.iter().map(|c| format!("<td>{}</td>", escape(c))).collect();
        let class = if marked == Some(i) { " class=\"marked\"" } else { "" };
        out.push_str(&format!("<tr{class}>{cells}</tr>\n"));
    }
    out.push_str("</tbody>\n</table></div>\n");
}

/// Text for HTML, attributes included.
pub(crate) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    out
}

const STYLE: &str = "
:root { color-scheme: light dark; --ink: #1c2128; --soft: #59636e; --line: #d1d9e0; --paper: #fff;
  --shade: #f6f8fa; --base: #8b949e; --tuned: #0969da; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9198a1; --line: #3d444d;
  --paper: #0d1117; --shade: #161b22; --base: #8b949e; --tuned: #58a6ff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 .75rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 0 0 .5rem; }
h4 { font-size: .8rem; margin: 0 0 .25rem; color: var(--soft); font-weight: 600; }
p { margin: .5rem 0; }
.headline { font-size: 1.15rem; padding: 1rem 1.25rem; background: var(--shade); border-left: 4px solid var(--tuned); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .75rem 0; font-size: .92rem; }
th, td { text-align: left; padding: .35rem .8rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 600; }
td { overflow-wrap: anywhere; }
td:first-child, td:last-child { overflow-wrap: normal; }
.marked td { background: var(--shade); font-weight: 600; }
.numeric th:not(:first-child), .numeric td:not(:first-child) { text-align: right; white-space: nowrap;
  font-variant-numeric: tabular-nums; padding-left: 1rem; }
td:first-child { min-width: 3rem; } .numeric td:first-child { min-width: 7rem; }
figure { margin: 1rem 0; overflow-x: auto; }
figure svg { width: 100%; min-width: 34rem; height: auto; }
details { margin: .75rem 0; } summary { cursor: pointer; color: var(--soft); font-size: .92rem; }
figcaption { color: var(--soft); font-size: .88rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--shade); padding: .6rem .8rem;
  margin: .25rem 0; font: .82rem/1.45 ui-monospace, monospace; border-radius: 4px; }
.example { border: 1px solid var(--line); border-radius: 6px; padding: .9rem 1rem; margin: .9rem 0; break-inside: avoid; }
.parts { display: grid; grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); gap: .75rem; }
.axis { stroke: var(--line); } .label { fill: var(--soft); font: 12px system-ui, sans-serif; }
.base-bar { fill: var(--base); } .tuned-bar { fill: var(--tuned); } .whisker { stroke: var(--ink); stroke-width: 1.5; }
.faint { opacity: .3; }
.train { fill: none; stroke: var(--tuned); stroke-width: 2; } .eval { fill: none; stroke: #d1710c; stroke-width: 2; }
.dot { fill: #d1710c; }
@media print { main { max-width: none; padding: 0; } h2 { break-after: avoid; } }
";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_text_cannot_leave_its_place() {
        let hostile = "<script>alert(1)</script> ``` | end";
        let blocks = [
            Block::Example { title: hostile.into(), parts: vec![(hostile.into(), hostile.into())] },
            Block::table(&["a"], vec![vec![hostile.into()]], false),
        ];
        let page = html(hostile, &blocks);
        assert!(!page.contains("<script>"));
        let text = markdown(hostile, &blocks);
        assert!(text.contains("````text\n<script>") && text.contains("``` \\| end |"), "{text}");
    }
}

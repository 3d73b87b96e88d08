//! Stage kind `tokenize-pack`: rendered texts to packed token rows.
//!
//! Texts carry their own begin and end marks; which are added is Unsloth's rule unless a param
//! asks for TRL's.

mod pack;

use checkpoint::{ModelConfig, ModelFolder, Tokenizer};
use contract::{
    InputSpec, Outcome, OutputSpec, ParamError, Reporter, Request, Signature, StageError,
    StageKind, parse_params,
};
use data::{RenderedRow, TokenFile, read_jsonl, write_json};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::pack::{Example, Pack, pack};

/// Changes when the same texts would give other tokens.
///
/// 2: `wrapped` cuts no example off.
const VERSION: &str = "2";
/// Row ids beyond this many are counted, not listed.
const LISTED: usize = 1000;

/// The stage kind `tokenize-pack`.
pub struct TokenizePack;

#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
struct Params {
    /// Longest row, in tokens.
    #[schemars(range(min = 2))]
    max_length: usize,
    pack: Pack,
    loss_on: LossOn,
    special_tokens: SpecialTokens,
    truncate: Truncate,
    /// Rows packed at a time.
    #[schemars(range(min = 1))]
    pack_batch: usize,
}

impl Default for Params {
    fn default() -> Self {
        Self {
            max_length: 2048,
            pack: Pack::Bfd,
            loss_on: LossOn::All,
            special_tokens: SpecialTokens::Unsloth,
            truncate: Truncate::Cut,
            pack_batch: 1000,
        }
    }
}

/// Which tokens are targets of the loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum LossOn {
    /// Every token.
    All,
    /// What the model is to say.
    Response,
}

/// Which marks are added to a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum SpecialTokens {
    /// A begin mark unless the text has one; no end mark.
    Unsloth,
    /// An end mark unless the text ends with one; the begin mark always.
    Trl,
}

/// What happens to an example longer than a row, which `wrapped` goes on with in the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum Truncate {
    /// Its end is cut off.
    Cut,
    /// It is left out.
    Drop,
    /// The stage fails.
    Error,
}

#[derive(Default)]
struct Tally {
    rows: usize,
    truncated: Vec<String>,
    dropped: Vec<String>,
    without_targets: Vec<String>,
}

impl StageKind for TokenizePack {
    fn name(&self) -> &'static str {
        "tokenize-pack"
    }

    fn summary(&self) -> &'static str {
        "tokenises rendered texts and packs them into rows of equal length"
    }

    fn version(&self) -> String {
        VERSION.to_owned()
    }

    fn resolve(&self, params: &Value) -> Result<Signature, ParamError> {
        let params: Params = parse_params(params)?;
        if params.max_length < 2 {
            return Err(ParamError::at("max_length", "a row needs at least 2 tokens"));
        }
        if params.pack_batch == 0 {
            return Err(ParamError::at("pack_batch", "must be 1 or more"));
        }
        Ok(Signature {
            inputs: vec![
                InputSpec::required("model", "model folder, for its tokenizer"),
                InputSpec::required("train", "rendered texts to train on"),
                InputSpec::optional("dev", "rendered texts to choose by"),
            ],
            outputs: vec![
                OutputSpec::file("train", "train.tokens.safetensors"),
                OutputSpec::file("dev", "dev.tokens.safetensors").optional(),
                OutputSpec::file("stats", "token-stats.json"),
            ],
            ..Signature::of(&params)?
        })
    }

    fn params_schema(&self) -> Value {
        contract::schema_of::<Params>()
    }

    fn run(&self, request: &Request, reporter: &mut Reporter) -> Result<Outcome, StageError> {
        let params: Params = request.params()?;
        let folder = ModelFolder::open(request.input("model")?)?;
        let context = ModelConfig::read(&folder)?.max_position_embeddings;
        if params.max_length > context {
            return Err(StageError::input(format!(
                "`max_length` is {} and the model reads at most {context} tokens",
                params.max_length
            ))
            .help("lower `max_length`"));
        }
        let tokenizer = folder.tokenizer()?;
        let mut stats = serde_json::Map::new();
        let mut outcome = Outcome::default();
        for split in ["train", "dev"] {
            let Some(path) = request.optional_input(split) else { continue };
            let rows: Vec<RenderedRow> = read_jsonl(path)?;
            let (file, tally) = tokenize(&params, &tokenizer, &rows, reporter)?;
            if file.label_mask.iter().all(|m| *m == 0) {
                return Err(StageError::input(format!(
                    "split `{split}` has no token to learn from"
                ))
                .help("is `max_length` too small, or does `loss_on: response` find no response?"));
            }
            file.write(request.output(split)?)?;
            if !tally.truncated.is_empty() {
                outcome.warnings.push(format!(
                    "{split}: {} of {} rows are longer than {} tokens and were cut (listed in token-stats.json)",
                    tally.truncated.len(), tally.rows, params.max_length
                ));
            }
            stats.insert(split.to_owned(), described(&file, &tally, params.max_length));
        }
        write_json(request.output("stats")?, &stats)?;
        Ok(outcome)
    }
}

fn tokenize(
    params: &Params,
    tokenizer: &Tokenizer,
    rows: &[RenderedRow],
    reporter: &mut Reporter,
) -> Result<(TokenFile, Tally), StageError> {
    let mut tally = Tally { rows: rows.len(), ..Tally::default() };
    let mut examples = Vec::with_capacity(rows.len());
    for (i, row) in rows.iter().enumerate() {
        let mut example = encode(params, tokenizer, row)
            .map_err(|e| StageError::input(format!("row `{}`: {}", row.id, e.message)))?;
        // TRL wraps whole examples: nothing is too long for it.
        if params.pack != Pack::Wrapped && example.ids.len() > params.max_length {
            let length = example.ids.len();
            match params.truncate {
                Truncate::Error => {
                    return Err(StageError::input(format!(
                        "row `{}` has {length} tokens, more than `max_length` ({})",
                        row.id, params.max_length
                    ))
                    .help("raise `max_length`, or set `truncate` to `cut` or `drop`"));
                }
                Truncate::Drop => {
                    tally.dropped.push(row.id.clone());
                    continue;
                }
                Truncate::Cut => {
                    tally.truncated.push(row.id.clone());
                    example.ids.truncate(params.max_length);
                    example.targets.truncate(params.max_length);
                }
            }
        }
        if example.targets.iter().skip(1).all(|t| *t == 0) {
            tally.without_targets.push(row.id.clone());
        }
        if !example.ids.is_empty() {
            examples.push(example);
        }
        reporter.advance(i as u64 + 1, rows.len() as u64, "rows", "");
    }
    Ok((pack(&examples, params.pack, params.max_length, params.pack_batch), tally))
}

fn encode(
    params: &Params,
    tokenizer: &Tokenizer,
    row: &RenderedRow,
) -> Result<Example, StageError> {
    let encoded = tokenizer.encode(&row.text)?;
    let mut ids: Vec<i32> = encoded.ids.iter().map(|id| *id as i32).collect();
    // A token is the model's own where its first byte is.
    let own = |(start, end): &(usize, usize)| {
        start < end && row.response_spans.iter().any(|[from, to]| (*from..*to).contains(start))
    };
    let mut targets: Vec<u8> = match params.loss_on {
        LossOn::All => vec![1; ids.len()],
        LossOn::Response => encoded.offsets.iter().map(|o| u8::from(own(o))).collect(),
    };
    let begins = tokenizer.bos().is_some_and(|bos| ids.first() == Some(&(bos as i32)));
    let trl = params.special_tokens == SpecialTokens::Trl;
    if let Some(bos) = tokenizer.bos().filter(|_| tokenizer.adds_bos() && (trl || !begins)) {
        ids.insert(0, bos as i32);
        targets.insert(0, 0);
    }
    if let Some(eos) = tokenizer.eos().filter(|eos| trl && ids.last() != Some(&(*eos as i32))) {
        ids.push(eos as i32);
        targets.push(1);
    }
    Ok(Example { ids, targets })
}

fn described(file: &TokenFile, tally: &Tally, max_length: usize) -> Value {
    let listed = |ids: &[String]| json!({"count": ids.len(), "ids": ids[..ids.len().min(LISTED)]});
    let longest = file.row_offsets.windows(2).map(|w| w[1] - w[0]).max().unwrap_or(0);
    let slots = file.rows() * max_length;
    json!({
        "rows": tally.rows,
        "tokens": file.tokens.len(),
        "targets": file.label_mask.iter().filter(|m| **m == 1).count(),
        "packed_rows": file.rows(),
        "longest_row": longest,
        "fill_rate": file.tokens.len() as f64 / slots.max(1) as f64,
        "truncated": listed(&tally.truncated),
        "dropped": listed(&tally.dropped),
        "without_targets": listed(&tally.without_targets),
    })
}

#[cfg(test)]
mod tests;

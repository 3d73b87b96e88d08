//! Params of the kind `evaluate`.

use contract::{ParamError, parse_params};
use model::{DeviceChoice, DtypeChoice};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Most rows decoded together.
const MOST_ROWS: usize = 65_536;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Params {
    /// Most tokens generated for a prompt.
    #[schemars(range(min = 1))]
    pub(crate) max_new_tokens: usize,
    /// Rows decoded together, else what suits the device. On the CPU that changes speed and memory
    /// only; on a GPU products have that many rows, so that rare tokens may differ.
    #[schemars(range(min = 1, max = 65_536))]
    pub(crate) batch_size: Option<usize>,
    pub(crate) device: DeviceChoice,
    pub(crate) dtype: DtypeChoice,
    /// Answers only the first so many prompts.
    #[schemars(range(min = 1))]
    pub(crate) limit: Option<usize>,
}

impl Default for Params {
    fn default() -> Self {
        let (device, dtype) = (DeviceChoice::Auto, DtypeChoice::Auto);
        Self { max_new_tokens: 96, batch_size: None, device, dtype, limit: None }
    }
}

impl Params {
    /// Parses, fills defaults in and checks every value.
    pub(crate) fn parse(params: &Value) -> Result<Self, ParamError> {
        let parsed: Self = parse_params(params)?;
        let least = "must be at least 1".to_owned();
        let rules = [
            ("max_new_tokens", parsed.max_new_tokens > 0, least.clone()),
            ("batch_size", parsed.batch_size != Some(0), least.clone()),
            (
                "batch_size",
                parsed.batch_size <= Some(MOST_ROWS),
                format!("must be at most {MOST_ROWS}"),
            ),
            ("limit", parsed.limit != Some(0), least),
        ];
        match rules.into_iter().find(|(_, holds, _)| !holds) {
            Some((path, _, rule)) => Err(ParamError::at(path, rule)),
            None => Ok(parsed),
        }
    }

    /// What can change an output. On the CPU the number of rows cannot; which device `auto` finds must
    /// not decide, since a fingerprint is the same on every host.
    pub(crate) fn identity(&self) -> Result<Value, ParamError> {
        let mut value = Self { device: self.device.identity(), ..self.clone() }.to_value()?;
        if (self.device == DeviceChoice::Cpu || self.batch_size.is_none())
            && let Some(map) = value.as_object_mut()
        {
            map.remove("batch_size");
        }
        Ok(value)
    }

    /// All params, defaults filled in.
    pub(crate) fn to_value(&self) -> Result<Value, ParamError> {
        serde_json::to_value(self).map_err(|e| ParamError::at("", e.to_string()))
    }

    /// How answers are decoded: two runs are comparable only where this is equal.
    pub(crate) fn decoding(&self) -> Map<String, Value> {
        let mut map = Map::new();
        map.insert("method".to_owned(), "greedy".into());
        map.insert("max_new_tokens".to_owned(), self.max_new_tokens.into());
        map.insert("limit".to_owned(), self.limit.into());
        map
    }
}

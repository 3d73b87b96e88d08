//! Writes safetensors in bf16, tensor by tensor, in shards with an index where there is much.

use std::collections::BTreeMap;
use std::io::{self, Write};

use half::bf16;
use serde_json::{Map, Value, json};

/// One file of a planned checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShardPlan {
    /// `model.safetensors`, or `model-00001-of-00002.safetensors`.
    pub file: String,
    /// Names and shapes in the order of the file.
    pub tensors: Vec<(String, Vec<usize>)>,
}

/// Bytes of a tensor in bf16.
fn bytes(shape: &[usize]) -> u64 {
    shape.iter().map(|d| *d as u64).product::<u64>() * 2
}

/// Fills files in the given order, each with at most `limit` bytes of tensors, as transformers
/// does; a tensor larger than that has a file of its own.
pub fn plan_shards(tensors: &[(String, Vec<usize>)], limit: u64) -> Vec<ShardPlan> {
    let mut shards: Vec<Vec<(String, Vec<usize>)>> = vec![Vec::new()];
    let mut filled = 0;
    for tensor in tensors {
        let size = bytes(&tensor.1);
        if filled > 0 && filled + size > limit {
            shards.push(Vec::new());
            filled = 0;
        }
        filled += size;
        if let Some(shard) = shards.last_mut() {
            shard.push(tensor.clone());
        }
    }
    let count = shards.len();
    let named = shards.into_iter().enumerate().map(|(i, tensors)| {
        let file = match count {
            1 => "model.safetensors".to_owned(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
        };
        ShardPlan { file, tensors }
    });
    named.collect()
}

/// The value of `model.safetensors.index.json` for several shards.
pub fn shard_index(shards: &[ShardPlan]) -> Value {
    let all = || shards.iter().flat_map(|s| s.tensors.iter().map(move |t| (s, t)));
    let total: u64 = all().map(|(_, (_, shape))| bytes(shape)).sum();
    let map: BTreeMap<&str, &str> =
        all().map(|(shard, (name, _))| (name.as_str(), shard.file.as_str())).collect();
    json!({"metadata": {"total_size": total}, "weight_map": map})
}

/// Writes one file; `values` gives each tensor in row-major f32, which is rounded to the nearest
/// bf16, ties to even.
///
/// # Errors
/// What `values` fails with, or what the disk says, as `E`; values of a wrong number are
/// [`io::ErrorKind::InvalidData`].
pub fn write_bf16<E: From<io::Error>>(
    out: &mut impl Write,
    shard: &ShardPlan,
    mut values: impl FnMut(&str, &[usize]) -> Result<Vec<f32>, E>,
) -> Result<(), E> {
    out.write_all(&header(shard))?;
    for (name, shape) in &shard.tensors {
        let values = values(name, shape)?;
        if values.len() != shape.iter().product::<usize>() {
            let message = format!("`{name}`: {} values for {shape:?}", values.len());
            return Err(io::Error::new(io::ErrorKind::InvalidData, message).into());
        }
        let encoded: Vec<u8> =
            values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect();
        out.write_all(&encoded)?;
    }
    Ok(())
}

/// Length and JSON, padded with blanks to eight bytes as the format asks.
fn header(shard: &ShardPlan) -> Vec<u8> {
    let mut entries = Map::new();
    entries.insert("__metadata__".to_owned(), json!({"format": "pt"}));
    let mut offset = 0;
    for (name, shape) in &shard.tensors {
        let end = offset + bytes(shape);
        let entry = json!({"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]});
        entries.insert(name.clone(), entry);
        offset = end;
    }
    let mut json = Value::Object(entries).to_string().into_bytes();
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut header = (json.len() as u64).to_le_bytes().to_vec();
    header.extend(json);
    header
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use safetensors::{Dtype, SafeTensors};

    use super::*;

    fn tensors() -> Vec<(String, Vec<usize>)> {
        let one = |name: &str, shape: &[usize]| (name.to_owned(), shape.to_vec());
        vec![one("a", &[2, 2]), one("b", &[3]), one("c", &[8, 4]), one("d", &[1])]
    }

    #[test]
    fn little_is_one_file_and_much_is_sharded_in_order() {
        let one = plan_shards(&tensors(), 1000);
        assert_eq!(one.len(), 1);
        assert_eq!(one[0].file, "model.safetensors");
        let many = plan_shards(&tensors(), 14);
        let files: Vec<(&str, Vec<&str>)> = many
            .iter()
            .map(|s| (s.file.as_str(), s.tensors.iter().map(|t| t.0.as_str()).collect()))
            .collect();
        let name = |i: u32| format!("model-{i:05}-of-00003.safetensors");
        let names = [name(1), name(2), name(3)];
        assert_eq!(
            files,
            [
                (names[0].as_str(), vec!["a", "b"]),
                (names[1].as_str(), vec!["c"]),
                (names[2].as_str(), vec!["d"])
            ]
        );
        let index = shard_index(&many);
        assert_eq!(index["metadata"]["total_size"], 80);
        assert_eq!(index["weight_map"]["c"], names[1]);
    }

    #[test]
    fn a_file_is_what_the_library_reads() {
        let plan = plan_shards(&tensors(), 1000);
        let mut file = Vec::new();
        write_bf16(&mut file, &plan[0], |_, shape| {
            Ok::<_, io::Error>(vec![1.003_f32; shape.iter().product()])
        })
        .unwrap();
        let read = SafeTensors::deserialize(&file).unwrap();
        let view = read.tensor("c").unwrap();
        assert_eq!((view.dtype(), view.shape()), (Dtype::BF16, &[8, 4][..]));
        assert_eq!(crate::to_f32(view.dtype(), view.data()).unwrap(), [1.0; 32]);
    }
}

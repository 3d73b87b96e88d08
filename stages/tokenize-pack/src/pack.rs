//! Packing as TRL does it: `bfd` (best fit, decreasing), `wrapped`, or one example a row.
//!
//! Source of the algorithms: `trl/data_utils.py` of TRL 1.15. `datasets.map(batched=True)` packs
//! 1000 rows at a time, which changes the result; so does this.

use std::collections::{BTreeMap, VecDeque};

use data::TokenFile;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How examples become rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Pack {
    /// Longest first, each into the fullest row that still has room.
    #[default]
    Bfd,
    /// All tokens in one string, cut every `max_length`.
    Wrapped,
    /// One example a row.
    None,
}

/// One tokenised example: ids, and which of them are targets.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Example {
    pub(crate) ids: Vec<i32>,
    pub(crate) targets: Vec<u8>,
}

/// Packs examples, none longer than `max_length` (except for `wrapped`), `batch` at a time.
pub(crate) fn pack(examples: &[Example], how: Pack, max_length: usize, batch: usize) -> TokenFile {
    let mut file = TokenFile { cu_seqlens: vec![0], row_offsets: vec![0], ..TokenFile::default() };
    for examples in examples.chunks(batch) {
        match how {
            Pack::None => examples.iter().for_each(|e| row(&mut file, &[e])),
            Pack::Bfd => {
                let lengths: Vec<usize> = examples.iter().map(|e| e.ids.len()).collect();
                for bin in best_fit_decreasing(&lengths, max_length) {
                    let members: Vec<&Example> = bin.into_iter().map(|i| &examples[i]).collect();
                    row(&mut file, &members);
                }
            }
            Pack::Wrapped => {
                let ids: Vec<i32> = examples.iter().flat_map(|e| e.ids.iter().copied()).collect();
                let targets: Vec<u8> =
                    examples.iter().flat_map(|e| e.targets.iter().copied()).collect();
                for (ids, targets) in ids.chunks(max_length).zip(targets.chunks(max_length)) {
                    row(&mut file, &[&Example { ids: ids.to_vec(), targets: targets.to_vec() }]);
                }
            }
        }
    }
    file
}

/// Adds one row; the first token of a segment has nothing before it and is never a target.
fn row(file: &mut TokenFile, segments: &[&Example]) {
    for segment in segments {
        let start = file.tokens.len();
        file.tokens.extend(&segment.ids);
        file.label_mask.extend(&segment.targets);
        if let Some(first) = file.label_mask.get_mut(start) {
            *first = 0;
        }
        file.cu_seqlens.push(file.tokens.len() as i32);
    }
    file.row_offsets.push(file.tokens.len() as i32);
}

/// Bins of example indices in the order of their creation. Ties: the earlier example first, and
/// among bins with equal room the one that has had it longest.
fn best_fit_decreasing(lengths: &[usize], capacity: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.sort_by_key(|i| std::cmp::Reverse(lengths[*i]));
    let mut bins: Vec<Vec<usize>> = Vec::new();
    let mut by_room: BTreeMap<usize, VecDeque<usize>> = BTreeMap::new();
    for i in order {
        let length = lengths[i];
        let fit = by_room.range(length.max(1)..).next().map(|(room, _)| *room);
        let (bin, room) = if let Some(room) = fit {
            let queue = by_room.entry(room).or_default();
            let bin = queue.pop_front().unwrap_or_default();
            if queue.is_empty() {
                by_room.remove(&room);
            }
            (bin, room - length)
        } else {
            bins.push(Vec::new());
            (bins.len() - 1, capacity.saturating_sub(length))
        };
        bins[bin].push(i);
        if room > 0 {
            by_room.entry(room).or_default().push_back(bin);
        }
    }
    bins
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn examples(lengths: &[usize]) -> Vec<Example> {
        let mut next = 0;
        let mut example = |n: usize| {
            let ids = (0..n)
                .map(|_| {
                    next += 1;
                    next
                })
                .collect();
            Example { ids, targets: vec![1; n] }
        };
        lengths.iter().map(|n| example(*n)).collect()
    }

    fn rows(file: &TokenFile) -> Vec<Vec<i32>> {
        let row = |w: &[i32]| file.tokens[w[0] as usize..w[1] as usize].to_vec();
        file.row_offsets.windows(2).map(row).collect()
    }

    #[test]
    fn bfd_of_trl_s_docstring() {
        let mut examples = examples(&[5, 2, 3, 1]);
        examples[0].ids.truncate(4);
        examples[0].targets.truncate(4);
        let file = pack(&examples, Pack::Bfd, 4, 1000);
        assert_eq!(rows(&file), [vec![1, 2, 3, 4], vec![8, 9, 10, 11], vec![6, 7]]);
        assert_eq!(file.cu_seqlens, [0, 4, 7, 8, 10]);
        assert_eq!(file.label_mask, [0, 1, 1, 1, 0, 1, 1, 0, 0, 1]);
    }

    #[test]
    fn wrapped_cuts_one_string_and_keeps_the_tail() {
        let file = pack(&examples(&[5, 2, 3, 1]), Pack::Wrapped, 4, 1000);
        assert_eq!(rows(&file), [vec![1, 2, 3, 4], vec![5, 6, 7, 8], vec![9, 10, 11]]);
    }

    /// `benches/fixtures/packing.py` has TRL pack them, 1000 examples at a time.
    #[derive(Deserialize)]
    struct Golden {
        lengths: BTreeMap<String, Vec<usize>>,
        cases: Vec<GoldenCase>,
    }

    #[derive(Deserialize)]
    struct GoldenCase {
        lengths: String,
        strategy: Pack,
        max_length: usize,
        /// First id and length of every segment of every row.
        rows: Vec<Vec<(i32, usize)>>,
    }

    #[test]
    fn real_lengths_are_packed_as_trl_packs_them() {
        let golden = include_str!("../../../tests/fixtures/packing.json");
        let golden: Golden = serde_json::from_str(golden).unwrap();
        assert!(golden.cases.len() >= 12);
        for case in &golden.cases {
            let mut next = 0;
            let examples: Vec<Example> = golden.lengths[&case.lengths]
                .iter()
                .map(|length| {
                    let mut ids: Vec<i32> = (next..next + *length as i32).collect();
                    next += *length as i32;
                    // As `truncate: cut` does before packing.
                    ids.truncate(if case.strategy == Pack::Bfd {
                        case.max_length
                    } else {
                        *length
                    });
                    Example { targets: vec![1; ids.len()], ids }
                })
                .collect();
            let file = pack(&examples, case.strategy, case.max_length, 1000);
            let name = format!("{} {:?} {}", case.lengths, case.strategy, case.max_length);
            assert_eq!(file.rows(), case.rows.len(), "{name}");
            let segments: Vec<(i32, usize)> = file
                .cu_seqlens
                .windows(2)
                .map(|w| (file.tokens[w[0] as usize], (w[1] - w[0]) as usize))
                .collect();
            assert_eq!(segments, case.rows.concat(), "{name}");
            let ends: Vec<i32> = case
                .rows
                .iter()
                .scan(0, |end, row| {
                    *end += row.iter().map(|(_, length)| *length as i32).sum::<i32>();
                    Some(*end)
                })
                .collect();
            assert_eq!(file.row_offsets[1..], ends, "{name}");
            for segment in file.cu_seqlens.windows(2) {
                let mask = &file.label_mask[segment[0] as usize..segment[1] as usize];
                assert!(mask[0] == 0 && mask[1..].iter().all(|m| *m == 1), "{name}");
            }
        }
    }

    #[test]
    fn batches_are_packed_apart() {
        assert_eq!(pack(&examples(&[1, 1, 1, 1]), Pack::Bfd, 4, 2).rows(), 2);
    }

    proptest! {
        #[test]
        fn bfd_keeps_every_example_once_and_never_overfills(
            lengths in prop::collection::vec(1_usize..50, 0..200),
        ) {
            let bins = best_fit_decreasing(&lengths, 50);
            let mut seen: Vec<usize> = bins.iter().flatten().copied().collect();
            seen.sort_unstable();
            prop_assert_eq!(seen, (0..lengths.len()).collect::<Vec<_>>());
            for bin in bins {
                prop_assert!(bin.iter().map(|i| lengths[*i]).sum::<usize>() <= 50);
            }
        }
    }
}

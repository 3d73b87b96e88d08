//! Packed token rows as the model takes them: tokens, segment bounds and targets of a micro-batch.

use data::TokenFile;
use model::MicroBatch;

/// Target of a position that counts in no loss.
const NO_TARGET: i32 = -100;

/// The packed rows of one split.
#[derive(Clone, Debug)]
pub(crate) struct PackedRows {
    file: TokenFile,
    /// Targets of each row.
    targets: Vec<u64>,
}

/// The buffers of one micro-batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RowBatch {
    tokens: Vec<i32>,
    cu_seqlens: Vec<i32>,
    targets: Vec<i32>,
}

impl PackedRows {
    /// Takes a checked token file.
    pub(crate) fn new(file: TokenFile) -> Self {
        let mut rows = Self { file, targets: Vec::new() };
        rows.targets = (0..rows.len())
            .map(|row| {
                let batch = rows.batch(&[row]);
                batch.targets.iter().filter(|t| **t != NO_TARGET).count() as u64
            })
            .collect();
        rows
    }

    /// Number of packed rows.
    pub(crate) fn len(&self) -> usize {
        self.file.rows()
    }

    /// Tokens of some rows.
    pub(crate) fn tokens(&self, rows: &[usize]) -> u64 {
        rows.iter().map(|r| self.bounds(*r)).map(|(from, to)| (to - from) as u64).sum()
    }

    /// Targets of some rows.
    pub(crate) fn targets(&self, rows: &[usize]) -> u64 {
        rows.iter().map(|r| self.targets[*r]).sum()
    }

    /// Tokens of the `count` longest rows together: no batch of as many rows has more.
    pub(crate) fn longest(&self, count: usize) -> usize {
        let mut lengths: Vec<u64> = (0..self.len()).map(|row| self.tokens(&[row])).collect();
        lengths.sort_unstable_by(|a, b| b.cmp(a));
        lengths.iter().take(count).sum::<u64>() as usize
    }

    /// Tokens of the longest segment.
    pub(crate) fn longest_segment(&self) -> usize {
        let lengths = self.file.cu_seqlens.windows(2).map(|w| (w[1] - w[0]) as usize);
        lengths.max().unwrap_or(0)
    }

    /// The first segment longer than `limit` tokens: its row and its length.
    pub(crate) fn longer_than(&self, limit: usize) -> Option<(usize, usize)> {
        let bounds = self.file.cu_seqlens.windows(2);
        let (start, length) =
            bounds.map(|w| (w[0], (w[1] - w[0]) as usize)).find(|(_, l)| *l > limit)?;
        Some((self.row_of(start), length))
    }

    /// The first token id outside `0..vocabulary`: its row and the id.
    pub(crate) fn outside_vocabulary(&self, vocabulary: usize) -> Option<(usize, i32)> {
        let inside = |t: &i32| usize::try_from(*t).is_ok_and(|t| t < vocabulary);
        let at = self.file.tokens.iter().position(|t| !inside(t))?;
        Some((self.row_of(at as i32), self.file.tokens[at]))
    }

    /// Some rows one after another, each segment on its own.
    pub(crate) fn batch(&self, rows: &[usize]) -> RowBatch {
        let mut batch = RowBatch { tokens: vec![], cu_seqlens: vec![0], targets: vec![] };
        for &row in rows {
            let (from, to) = self.bounds(row);
            let shift = batch.tokens.len() as i32 - from;
            let cu = &self.file.cu_seqlens;
            let first = cu.partition_point(|b| *b < from);
            let last = cu.partition_point(|b| *b < to);
            for w in cu[first..=last].windows(2) {
                self.push_segment(w[0] as usize, w[1] as usize, &mut batch);
                batch.cu_seqlens.push(w[1] + shift);
            }
        }
        batch
    }

    /// The target of a position is the next token of its segment, where that one counts.
    fn push_segment(&self, from: usize, to: usize, batch: &mut RowBatch) {
        batch.tokens.extend_from_slice(&self.file.tokens[from..to]);
        for next in from + 1..to {
            let counts = self.file.label_mask[next] == 1;
            batch.targets.push(if counts { self.file.tokens[next] } else { NO_TARGET });
        }
        if to > from {
            batch.targets.push(NO_TARGET);
        }
    }

    fn bounds(&self, row: usize) -> (i32, i32) {
        (self.file.row_offsets[row], self.file.row_offsets[row + 1])
    }

    fn row_of(&self, token: i32) -> usize {
        self.file.row_offsets.partition_point(|o| *o <= token).saturating_sub(1)
    }
}

impl RowBatch {
    /// The batch as the model takes it.
    pub(crate) fn view(&self) -> MicroBatch<'_> {
        MicroBatch { tokens: &self.tokens, cu_seqlens: &self.cu_seqlens, targets: &self.targets }
    }

    /// Tokens of the batch.
    pub(crate) fn len(&self) -> usize {
        self.tokens.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows() -> PackedRows {
        PackedRows::new(TokenFile {
            tokens: vec![10, 11, 12, 20, 21, 30, 31, 32, 33],
            cu_seqlens: vec![0, 3, 5, 9],
            row_offsets: vec![0, 5, 9],
            label_mask: vec![1, 0, 1, 1, 1, 0, 0, 1, 1],
        })
    }

    #[test]
    fn targets_are_next_tokens_that_count_and_never_cross_a_segment() {
        let batch = rows().batch(&[1, 0]);
        assert_eq!(batch.tokens, [30, 31, 32, 33, 10, 11, 12, 20, 21]);
        assert_eq!(batch.cu_seqlens, [0, 4, 7, 9]);
        assert_eq!(batch.targets, [-100, 32, 33, -100, -100, 12, -100, 21, -100]);
        assert_eq!((rows().targets(&[0]), rows().targets(&[0, 1])), (2, 4));
        assert_eq!((rows().tokens(&[0]), rows().tokens(&[0, 1])), (5, 9));
    }

    #[test]
    fn an_empty_segment_stays_empty() {
        let file = TokenFile {
            tokens: vec![1, 2],
            cu_seqlens: vec![0, 0, 2],
            row_offsets: vec![0, 2],
            label_mask: vec![1, 1],
        };
        let batch = PackedRows::new(file).batch(&[0]);
        assert_eq!((batch.cu_seqlens, batch.targets), (vec![0, 0, 2], vec![2, -100]));
    }

    #[test]
    fn faults_are_located_by_row() {
        assert_eq!(rows().longer_than(3), Some((1, 4)));
        assert_eq!(rows().longer_than(4), None);
        assert_eq!((rows().longest_segment(), rows().longest(1)), (4, 5));
        assert_eq!(rows().outside_vocabulary(33), Some((1, 33)));
        assert_eq!(rows().outside_vocabulary(34), None);
    }
}

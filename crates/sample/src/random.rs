//! Random numbers that depend on seed, document and position alone.

/// Draws for one document.
pub struct Draws {
    key: u64,
    count: u64,
}

impl Draws {
    /// The draws of document `number` of a seed.
    pub fn new(seed: u64, number: u64) -> Draws {
        Draws { key: mix(seed ^ mix(number.wrapping_add(0x51ed))), count: 0 }
    }

    /// The next number in 0 to 1.
    pub fn next(&mut self) -> f64 {
        self.count += 1;
        (mix(self.key.wrapping_add(self.count.wrapping_mul(0x9E37_79B9_7F4A_7C15))) >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// SplitMix64's finaliser.
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

//! The words of [`Lanes`] as plain loops: what every instruction set must agree with.

use super::lanes::Lanes;
use crate::grid::widen;

/// Sixteen lanes as arrays. There is no fused multiply-add without an instruction for it, so floats differ from
/// the other tables in the last bit.
pub struct Generic;

/// # Safety
/// The processor has the instructions, and the pointers hold what [`Lanes`] says.
unsafe fn array<T: Copy, const N: usize>(p: *const u8) -> [T; N] {
    // SAFETY: the caller says that so many bytes may be read; the types have no invalid patterns.
    unsafe { p.cast::<[T; N]>().read_unaligned() }
}

// SAFETY: plain loops that read and write what the trait says.
unsafe impl Lanes for Generic {
    type Bytes = [u8; 64];
    type Ints = [i32; 16];
    type Floats = [f32; 16];
    const SIGNED: bool = false;

    #[inline(always)]
    unsafe fn bytes(p: *const u8) -> [u8; 64] {
        unsafe { array(p) }
    }
    #[inline(always)]
    unsafe fn and(b: [u8; 64], mask: u8) -> [u8; 64] {
        b.map(|v| v & mask)
    }
    #[inline(always)]
    unsafe fn or(a: [u8; 64], b: [u8; 64]) -> [u8; 64] {
        std::array::from_fn(|i| a[i] | b[i])
    }
    #[inline(always)]
    unsafe fn down<const N: u32>(b: [u8; 64]) -> [u8; 64] {
        b.map(|v| v >> N)
    }
    #[inline(always)]
    unsafe fn up<const N: u32>(b: [u8; 64]) -> [u8; 64] {
        b.map(|v| v << N)
    }
    #[inline(always)]
    unsafe fn lookup(table: &[u8; 16], b: [u8; 64]) -> [u8; 64] {
        b.map(|v| table[usize::from(v & 15)])
    }
    #[inline(always)]
    unsafe fn dot(acc: [i32; 16], w: [u8; 64], x: [i32; 16]) -> [i32; 16] {
        let x = x.map(|x| x.to_le_bytes().map(|b| b as i8));
        std::array::from_fn(|l| acc[l] + (0..4).map(|i| i32::from(w[4 * l + i]) * i32::from(x[l][i])).sum::<i32>())
    }
    #[inline(always)]
    unsafe fn dot_wide(acc: [i32; 16], w: [u8; 64], x: [i32; 16]) -> [i32; 16] {
        unsafe { Self::dot(acc, w, x) }
    }
    #[inline(always)]
    unsafe fn select(first: *const u8, second: *const u8, from: [u8; 64]) -> [i32; 16] {
        // SAFETY: the caller's.
        let all = unsafe { [first.cast::<[u8; 4]>().read_unaligned(), second.cast::<[u8; 4]>().read_unaligned()] };
        let all = all.as_flattened();
        std::array::from_fn(|l| i32::from_le_bytes(std::array::from_fn(|i| all[usize::from(from[4 * l + i] & 7)])))
    }
    #[inline(always)]
    unsafe fn splat_int(p: *const u8) -> [i32; 16] {
        [unsafe { p.cast::<i32>().read_unaligned() }; 16]
    }
    #[inline(always)]
    unsafe fn ints(p: *const i32) -> [i32; 16] {
        unsafe { p.cast::<[i32; 16]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn ints_up<const N: u32>(a: [i32; 16]) -> [i32; 16] {
        a.map(|v| v << N)
    }
    #[inline(always)]
    unsafe fn to_floats(a: [i32; 16]) -> [f32; 16] {
        a.map(|v| v as f32)
    }
    #[inline(always)]
    unsafe fn to_ints(a: [f32; 16]) -> [i32; 16] {
        a.map(|v| v as i32)
    }
    #[inline(always)]
    unsafe fn zero() -> [f32; 16] {
        [0.0; 16]
    }
    #[inline(always)]
    unsafe fn splat(p: *const u8) -> [f32; 16] {
        [unsafe { p.cast::<f32>().read_unaligned() }; 16]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> [f32; 16] {
        unsafe { array(p.cast()) }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, a: [f32; 16]) {
        unsafe { p.cast::<[f32; 16]>().write_unaligned(a) }
    }
    #[inline(always)]
    unsafe fn halves(p: *const u8) -> [f32; 16] {
        let v: [u16; 16] = unsafe { array(p) };
        v.map(widen)
    }
    #[inline(always)]
    unsafe fn uppermost(p: *const u8) -> [[f32; 16]; 2] {
        let v: [[u32; 16]; 4] = [0, 1, 2, 3].map(|i| unsafe { array(p.add(64 * i)) });
        let half = |low: usize| std::array::from_fn(|i| widen((v[low][i] >> 24 | v[low + 1][i] >> 24 << 8) as u16));
        [half(0), half(2)]
    }
    #[inline(always)]
    unsafe fn signed(p: *const u8) -> [f32; 16] {
        let v: [i8; 16] = unsafe { array(p) };
        v.map(f32::from)
    }
    #[inline(always)]
    unsafe fn nibbles(p: *const u8) -> ([f32; 16], [f32; 16]) {
        let v: [u8; 16] = unsafe { array(p) };
        (v.map(|v| f32::from(v & 15)), v.map(|v| f32::from(v >> 4)))
    }
    #[inline(always)]
    unsafe fn sixes(p: *const u8, d: [f32; 16], m: [f32; 16]) -> [[f32; 16]; 4] {
        let v: [u32; 16] = unsafe { array(p) };
        let field = |at: u32, i: usize| (v[i] >> at & 63) as f32;
        [
            std::array::from_fn(|i| d[i] * field(0, i)),
            std::array::from_fn(|i| d[i] * field(6, i)),
            std::array::from_fn(|i| -(m[i] * field(12, i))),
            std::array::from_fn(|i| -(m[i] * field(18, i))),
        ]
    }
    #[inline(always)]
    unsafe fn add(a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        std::array::from_fn(|i| a[i] + b[i])
    }
    #[inline(always)]
    unsafe fn max(a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        std::array::from_fn(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    unsafe fn power(n: [f32; 16]) -> [f32; 16] {
        n.map(|n| f32::from_bits(((n as i32 + 127) as u32) << 23))
    }
    #[inline(always)]
    unsafe fn mul(a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        std::array::from_fn(|i| a[i] * b[i])
    }
    #[inline(always)]
    unsafe fn negative_mul(a: [f32; 16], b: [f32; 16]) -> [f32; 16] {
        std::array::from_fn(|i| -(a[i] * b[i]))
    }
    #[inline(always)]
    unsafe fn fma(a: [f32; 16], b: [f32; 16], c: [f32; 16]) -> [f32; 16] {
        std::array::from_fn(|i| a[i] * b[i] + c[i])
    }
    #[inline(always)]
    unsafe fn brain_pair(w: [u8; 64]) -> [[f32; 16]; 2] {
        [0, 2].map(|half| {
            std::array::from_fn(|l| {
                let at = 4 * l + half;
                f32::from_bits(u32::from(w[at]) << 16 | u32::from(w[at + 1]) << 24)
            })
        })
    }
}

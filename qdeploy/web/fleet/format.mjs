// Numbers and times for people.

const WHOLE = new Intl.NumberFormat("en");
const UNITS = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB"];

/** 1234567 -> "1,234,567". */
export const count = (value) => WHOLE.format(value);

/** Bytes with three digits: 48213 -> "47.1 KiB". */
export function bytes(value) {
  let unit = 0;
  while (Math.abs(value) >= 1023.5 && unit < UNITS.length - 1) {
    value /= 1024;
    unit += 1;
  }
  const digits = unit === 0 || value >= 99.95 ? 0 : value >= 9.995 ? 1 : 2;
  return `${value.toFixed(digits)} ${value === 1 && unit === 0 ? "byte" : UNITS[unit]}`;
}

/** A share as per cent that says 100 and 0 only where they are exact. */
export function share(part, whole) {
  if (!whole) return "–";
  const value = (100 * part) / whole;
  if (part === whole || part === 0) return `${value.toFixed(0)}%`;
  return `${Math.min(99.9, Math.max(0.1, value)).toFixed(1)}%`;
}

/** Seconds as one number and a unit: 90 -> "90 s", 7200 -> "2 h". */
export function span(seconds) {
  const value = Math.max(0, seconds);
  if (value < 100) return `${Math.round(value)} s`;
  if (value < 100 * 60) return `${Math.round(value / 60)} min`;
  if (value < 48 * 3600) return `${Math.round(value / 3600)} h`;
  return `${Math.round(value / 86400)} d`;
}

/** Seconds since 1970 as UTC. */
export const utc = (seconds) => `${new Date(seconds * 1000).toISOString().slice(0, 19).replace("T", " ")} UTC`;

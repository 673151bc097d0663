//go:build !failpoints

package failpoint

import "time"

// Pass is a place at which the process may crash, wait or panic.
func Pass(Point) {}

// Fail is a place at which, besides, an operation may fail.
func Fail(Point) error { return nil }

// WallClock is the time of day, which somebody may set.
func WallClock() time.Time { return time.Now().Round(0) }

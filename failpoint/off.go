//go:build !failpoints

package failpoint

import "time"

// Pass does nothing in a normal build.
func Pass(Point) {}

// Fail does nothing in a normal build.
func Fail(Point) error { return nil }

// WallClock is the time of day.
func WallClock() time.Time { return time.Now().Round(0) }

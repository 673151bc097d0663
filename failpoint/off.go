//go:build !failpoints

package failpoint

// Pass is a place at which the process may crash, wait or panic.
func Pass(Point) {}

// Fail is a place at which, besides, an operation may fail.
func Fail(Point) error { return nil }

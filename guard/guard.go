// Package guard keeps panics from ending the process: a panic in any goroutine does, and what makes it panic is mostly still there
// after the next start.
package guard

import (
	"context"
	"runtime/debug"
	"time"

	"github.com/sirupsen/logrus"
)

// pause is the pause before a component goes on that has panicked: what made it panic is mostly still there.
const pause = time.Second

// Run calls f, and reports whether f returned. A panic in f is logged with its stack and goes no further: no goroutine of ours runs
// anything unguarded. f must free what it holds in deferred calls. What f does stands in the log.
func Run(what string, f func()) (ok bool) {
	defer func() {
		if p := recover(); p != nil {
			Log(what, p)
		}
	}()
	f()
	return true
}

// Log says at error level where a panic came from. It is called by the deferred function that recovered it.
func Log(what string, p any) {
	logrus.WithFields(logrus.Fields{
		"component": "expiration", "doing": what, "panic": p, "stack": string(debug.Stack()),
	}).Error("Recovered from a panic")
}

// KeepGoing calls f until it returns without a panic or ctx is done, and pauses in between.
func KeepGoing(ctx context.Context, what string, f func()) {
	for !Run(what, f) {
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
	}
}

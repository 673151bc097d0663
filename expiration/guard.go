package expiration

import (
	"context"
	"runtime/debug"
	"time"

	"github.com/sirupsen/logrus"
)

// panicPause is the pause before a component goes on that has panicked: what made it panic is mostly still there.
const panicPause = time.Second

// guarded calls f, and reports whether f returned. A panic in f is logged with its stack and goes no further: a goroutine of this
// package runs nothing unguarded, because a panic in any goroutine ends the process. f must free what it holds in deferred calls.
func guarded(what string, f func()) (ok bool) {
	defer func() {
		if p := recover(); p != nil {
			logPanic(what, p)
		}
	}()
	f()
	return true
}

// logPanic says at error level where a panic came from. It is called by the deferred function that recovered it.
func logPanic(what string, p any) {
	logrus.WithFields(logrus.Fields{
		"component": "expiration", "doing": what, "panic": p, "stack": string(debug.Stack()),
	}).Error("Recovered from a panic")
}

// keepGoing calls f until it returns without a panic or ctx is done, and pauses in between.
func keepGoing(ctx context.Context, what string, f func()) {
	for !guarded(what, f) {
		select {
		case <-ctx.Done():
			return
		case <-time.After(panicPause):
		}
	}
}

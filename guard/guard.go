// Package guard keeps a panic in one of our goroutines from ending the process. The cause of a panic mostly survives a restart, so the
// process would only crash again.
package guard

import (
	"context"
	"runtime/debug"
	"time"

	"github.com/sirupsen/logrus"
)

// pause is the time before a component that panicked continues. The cause of the panic is mostly still there.
const pause = time.Second

// Run calls f, and reports whether f returned without a panic. A panic in f is logged with its stack and goes no further. f must release
// what it holds in deferred calls. what describes f in the log.
func Run(what string, f func()) (ok bool) {
	defer func() {
		if p := recover(); p != nil {
			logrus.WithFields(logrus.Fields{
				"component": "expiration", "doing": what, "panic": p, "stack": string(debug.Stack()),
			}).Error("Recovered from a panic")
		}
	}()
	f()
	return true
}

// KeepGoing calls f until it returns without a panic or ctx is done. It pauses after each panic.
func KeepGoing(ctx context.Context, what string, f func()) {
	for !Run(what, f) {
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
	}
}

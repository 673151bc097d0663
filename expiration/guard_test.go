package expiration

import (
	"context"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sirupsen/logrus"
	logtest "github.com/sirupsen/logrus/hooks/test"
	"github.com/stretchr/testify/require"
)

func TestGuarded(t *testing.T) {
	require.Empty(t, panicsIn(t, func() { require.True(t, guarded("returning", func() {})) }))
	logged := panicsIn(t, func() { require.False(t, guarded("panicking", func() { panic("on purpose") })) })
	require.Len(t, logged, 1)
	require.Equal(t, "on purpose", logged[0].Data["panic"])
	require.Equal(t, "panicking", logged[0].Data["doing"])
	require.Contains(t, logged[0].Data["stack"], "TestGuarded")
}

// panicsIn returns what is logged of panics while f runs.
func panicsIn(t *testing.T, f func()) (entries []logrus.Entry) {
	t.Helper()
	level, hooks := logrus.GetLevel(), logrus.StandardLogger().Hooks
	defer func() {
		logrus.SetLevel(level)
		logrus.StandardLogger().ReplaceHooks(hooks)
	}()
	logrus.SetLevel(logrus.ErrorLevel)
	logrus.StandardLogger().ReplaceHooks(logrus.LevelHooks{})
	hook := logtest.NewGlobal()
	f()
	for _, e := range hook.AllEntries() {
		if _, ok := e.Data["panic"]; ok {
			entries = append(entries, *e)
		}
	}
	return entries
}

func TestKeepGoing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		var began atomic.Int32
		var panicking atomic.Bool
		panicking.Store(true)
		go keepGoing(ctx, "working", func() {
			began.Add(1)
			if panicking.Load() {
				panic("on purpose")
			}
			<-ctx.Done()
		})
		time.Sleep(2*panicPause + panicPause/2)
		require.EqualValues(t, 3, began.Load(), "again after each panic, with a pause")
		panicking.Store(false)
		time.Sleep(10 * panicPause)
		require.EqualValues(t, 4, began.Load(), "and not when it works")
		cancel()
		synctest.Wait()

		go keepGoing(ctx, "working", func() { panic("on purpose") })
		synctest.Wait() // it ends: the context is done
	})
}

// The scheduler, the pruning and the deletions go on after a panic in any of them: nobody restarts them.
func TestGoesOnAfterPanics(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		e := w.message("!room", 10*time.Second)
		w.store.set(false, panicking("prune", "read", "delete", "drop"))
		time.Sleep(pruneInterval)
		w.store.set(false, nil)
		time.Sleep(lastPause)
		other := w.message("!room", 10*time.Second)
		time.Sleep(time.Minute)
		w.wantClosings(e, other)
		w.wantNoRows()
		time.Sleep(pruneInterval)
		require.NotZero(t, w.store.pruned())
	})
	inWorld(t, Config{}, func(t *testing.T, w *world) { // the scheduler itself
		w.mu.Lock()
		w.index.wakes.slots = append(w.index.wakes.slots, 1<<20) // there is no such slot
		w.mu.Unlock()
		w.notify()
		synctest.Wait()
		w.mu.Lock()
		w.index.wakes.slots = nil
		w.mu.Unlock()
		e := w.message("!room", 10*time.Second)
		time.Sleep(10*time.Second + panicPause)
		w.wantClosings(e)
	})
}

// panicking returns a panic in some operations of the store.
func panicking(operations ...string) func(string) error {
	fail := failing(operations...)
	return func(operation string) error {
		if fail(operation) != nil {
			panic("on purpose: " + operation)
		}
		return nil
	}
}

package guard

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

func TestRun(t *testing.T) {
	require.Empty(t, panicsIn(t, func() { require.True(t, Run("returning", func() {})) }))
	logged := panicsIn(t, func() { require.False(t, Run("panicking", func() { panic("on purpose") })) })
	require.Len(t, logged, 1)
	require.Equal(t, "on purpose", logged[0].Data["panic"])
	require.Equal(t, "panicking", logged[0].Data["doing"])
	require.Contains(t, logged[0].Data["stack"], "TestRun")
}

// panicsIn returns the panics that are logged while f runs.
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
		go KeepGoing(ctx, "working", func() {
			began.Add(1)
			if panicking.Load() {
				panic("on purpose")
			}
			<-ctx.Done()
		})
		time.Sleep(2*pause + pause/2)
		require.EqualValues(t, 3, began.Load(), "f is called again after each panic, with a pause")
		panicking.Store(false)
		time.Sleep(10 * pause)
		require.EqualValues(t, 4, began.Load(), "f is not called again after it returns")
		cancel()
		synctest.Wait()

		go KeepGoing(ctx, "working", func() { panic("on purpose") })
		synctest.Wait() // KeepGoing returns, because the context is done
	})
}

package keylock

import (
	"context"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// One caller holds a lock at a time. Waiting ends with the context, and does not concern other keys. Bounds hold, and unused locks are
// removed.
func TestLocks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := WithPlaces[string](1, 2)
		lock := func(key string, patience time.Duration) (func(), error) {
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			return l.Lock(ctx, key)
		}
		first, err := lock("a", time.Second)
		require.NoError(t, err)
		_, err = lock("a", time.Second)
		require.ErrorIs(t, err, context.DeadlineExceeded)
		other, err := lock("b", time.Second)
		require.NoError(t, err)
		other()
		go func() {
			time.Sleep(time.Second)
			_, err := lock("a", time.Minute)
			require.ErrorIs(t, err, ErrCrowded)
			first()
		}()
		began := time.Now()
		second, err := lock("a", time.Minute)
		require.NoError(t, err)
		require.Equal(t, time.Second, time.Since(began))
		second()
		require.Zero(t, l.Len())
	})
}

// Any number of callers may wait.
func TestManyWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, got := New[int](), 0
		unlock, err := l.Lock(t.Context(), 0)
		require.NoError(t, err)
		for range 1000 {
			go func() {
				unlock, err := l.Lock(t.Context(), 0)
				require.NoError(t, err)
				got++
				unlock()
			}()
		}
		synctest.Wait()
		require.Zero(t, got)
		unlock()
		synctest.Wait()
		require.Equal(t, 1000, got)
		require.Zero(t, l.Len())
	})
}

// As many callers hold a lock as it has places.
func TestPlaces(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, got := WithPlaces[int](2, 0), atomic.Int64{}
		for range 5 {
			go func() {
				unlock, err := l.Lock(t.Context(), 0)
				require.NoError(t, err)
				got.Add(1)
				time.Sleep(time.Second)
				unlock()
			}()
		}
		for _, want := range []int64{2, 4, 5} {
			synctest.Wait()
			require.Equal(t, want, got.Load())
			time.Sleep(time.Second)
		}
		synctest.Wait()
		require.Zero(t, l.Len())
	})
}

package expiration

import (
	"context"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// gone is the number of a timer that slowStore has not.
const gone = -1

// slowStore takes a second for a batch, and remembers how large each was.
type slowStore struct {
	Store
	batches []int
	err     error
	panics  bool
}

func (s *slowStore) Refresh(_ context.Context, refreshes []Refresh) ([]bool, error) {
	time.Sleep(time.Second)
	s.batches = append(s.batches, len(refreshes))
	if s.panics {
		panic("on purpose")
	}
	found := make([]bool, len(refreshes))
	for i, r := range refreshes {
		found[i] = r.NID != gone
	}
	return found, s.err
}

// refreshAll makes refreshes at the same time, and returns how many went well and how long each took.
func refreshAll(t *testing.T, b *batches[Refresh, bool], n int) (ok int, took []time.Duration) {
	t.Helper()
	var (
		wg    sync.WaitGroup
		mu    sync.Mutex
		start = time.Now()
	)
	for i := range n {
		wg.Go(func() {
			found, err := b.do(t.Context(), Refresh{NID: int64(i)})
			mu.Lock()
			defer mu.Unlock()
			if found && err == nil {
				ok++
			}
			took = append(took, time.Since(start))
		})
		synctest.Wait()
	}
	wg.Wait()
	return ok, took
}

func TestBatches(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &slowStore{}
		b := newBatches(store.Refresh)
		found, err := b.do(t.Context(), Refresh{NID: gone})
		require.NoError(t, err)
		require.False(t, found)

		// The first waits for nobody. The others gather while it is being dealt with, up to the limit of a batch.
		store.batches = nil
		ok, took := refreshAll(t, b, 1+maxBatch+10)
		require.Equal(t, 1+maxBatch+10, ok)
		require.Equal(t, []int{1, maxBatch, 10}, store.batches)
		require.Equal(t, time.Second, took[0])
		require.Equal(t, 3*time.Second, took[len(took)-1])
		require.Nil(t, b.next)

		// What fails, fails for its own batch.
		store.err = errFault
		ok, _ = refreshAll(t, b, 10)
		require.Zero(t, ok)
		store.err = nil
		ok, _ = refreshAll(t, b, 10)
		require.Equal(t, 10, ok)
	})
}

// Who commits for others and hangs up, or panics, leaves nobody waiting.
func TestBatchOfOneWhoGivesUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &slowStore{panics: true}
		b := newBatches(store.Refresh)
		var wg sync.WaitGroup
		wg.Go(func() {
			defer func() { require.NotNil(t, recover()) }()
			_, _ = b.do(t.Context(), Refresh{NID: 1})
		})
		synctest.Wait()
		wg.Go(func() {
			defer func() { require.NotNil(t, recover()) }()
			_, _ = b.do(t.Context(), Refresh{NID: 2})
		})
		synctest.Wait()
		wg.Go(func() {
			_, err := b.do(t.Context(), Refresh{NID: 3})
			require.ErrorIs(t, err, errUndecided)
		})
		wg.Wait()
		store.panics = false
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		found, err := b.do(ctx, Refresh{NID: 4})
		require.NoError(t, err)
		require.True(t, found)
	})
}

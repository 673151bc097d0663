package batch

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

type question struct{ nid int64 }

var errFault = errors.New("fault")

// gone is the number of a timer that slowStore does not have.
const gone = -1

// slowStore takes a second per batch, and records the size of each batch.
type slowStore struct {
	batches []int
	err     error
	panics  bool
}

func (s *slowStore) Refresh(_ context.Context, refreshes []question) ([]bool, error) {
	time.Sleep(time.Second)
	s.batches = append(s.batches, len(refreshes))
	if s.panics {
		panic("on purpose")
	}
	found := make([]bool, len(refreshes))
	for i, r := range refreshes {
		found[i] = r.nid != gone
	}
	return found, s.err
}

// refreshAll makes concurrent refreshes. It returns how many succeeded and how long each took.
func refreshAll(t *testing.T, b *Batches[question, bool], n int) (ok int, took []time.Duration) {
	t.Helper()
	var (
		wg    sync.WaitGroup
		mu    sync.Mutex
		start = time.Now()
	)
	for i := range n {
		wg.Go(func() {
			found, err := b.Do(t.Context(), question{nid: int64(i)})
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
		b := New(store.Refresh)
		found, err := b.Do(t.Context(), question{nid: gone})
		require.NoError(t, err)
		require.False(t, found)

		// The first question is asked at once. Meanwhile the others gather, up to the limit of a batch.
		store.batches = nil
		ok, took := refreshAll(t, b, 1+Max+10)
		require.Equal(t, 1+Max+10, ok)
		require.Equal(t, []int{1, Max, 10}, store.batches)
		require.Equal(t, time.Second, took[0])
		require.Equal(t, 3*time.Second, took[len(took)-1])
		require.Nil(t, b.next)

		// An error only concerns its own batch.
		store.err = errFault
		ok, _ = refreshAll(t, b, 10)
		require.Zero(t, ok)
		store.err = nil
		ok, _ = refreshAll(t, b, 10)
		require.Equal(t, 10, ok)
	})
}

// A panic ends neither the process nor the batches. All callers of the batch get an error, and the next batch is asked.
func TestBatchThatPanics(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &slowStore{panics: true}
		b := New(store.Refresh)
		var wg sync.WaitGroup
		for i := range 3 {
			wg.Go(func() {
				_, err := b.Do(t.Context(), question{nid: int64(i)})
				assert.ErrorIs(t, err, ErrUndecided)
			})
			synctest.Wait()
		}
		wg.Wait()
		require.Equal(t, []int{1, 2}, store.batches)
		store.panics = false
		found, err := b.Do(t.Context(), question{nid: 4})
		require.NoError(t, err)
		require.True(t, found)
	})
}

// A caller that gives up while its batch gathers withdraws the question, even if it was to ask for the batch. After that it waits for the
// answer.
func TestBatchOfSomeWhoGiveUp(t *testing.T) {
	for _, stay := range [][]int{{}, {1}, {Max}, {2, 3, 5}, {Max + 3}, {1, Max, Max + 1, Max + 9}} {
		synctest.Test(t, func(t *testing.T) {
			const callers = Max + 10
			var asked [][]question
			b := New(func(_ context.Context, refreshes []question) ([]int64, error) {
				asked = append(asked, slices.Clone(refreshes))
				time.Sleep(time.Second)
				var nids []int64
				for _, r := range refreshes {
					nids = append(nids, r.nid)
				}
				return nids, nil
			})
			ctx, cancel := context.WithCancel(t.Context())
			var wg sync.WaitGroup
			var withdrawn atomic.Int64
			for i := range callers {
				wg.Go(func() {
					mine := ctx
					if slices.Contains(stay, i) {
						mine = t.Context()
					}
					nid, err := b.Do(mine, question{nid: int64(i)})
					if mine == ctx && i > 0 {
						assert.ErrorIs(t, err, ErrNotAsked)
						assert.ErrorIs(t, err, context.Canceled)
						withdrawn.Add(1)
						return
					}
					assert.NoError(t, err, "the first is being asked already")
					assert.EqualValues(t, i, nid, "each caller gets its own answer")
				})
				synctest.Wait()
			}
			cancel()
			synctest.Wait()
			require.EqualValues(t, callers-1-len(stay), withdrawn.Load(), "at once")
			wg.Wait()
			left := 0
			for i, batch := range asked {
				require.NotEmpty(t, batch)
				if i > 0 {
					left += len(batch)
				}
			}
			require.Equal(t, len(stay), left, "withdrawn questions are not asked")
		})
	}
}

// A caller whose context has already ended asks nothing.
func TestBatchOfNobody(t *testing.T) {
	b := New(func(context.Context, []question) ([]bool, error) { panic("asked") })
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := b.Do(ctx, question{})
	require.ErrorIs(t, err, ErrNotAsked)
}

// Callers arrive and give up at random, and each answer belongs to its question.
func TestBatchesAtRandom(t *testing.T) {
	for seed := range uint64(20) {
		synctest.Test(t, func(t *testing.T) {
			random := rand.New(rand.NewPCG(seed, 0))
			asked := map[int64]int{}
			b := New(func(_ context.Context, refreshes []question) ([]int64, error) {
				nids := make([]int64, len(refreshes))
				for i, r := range refreshes {
					nids[i] = r.nid
					asked[r.nid]++
				}
				time.Sleep(10 * time.Millisecond)
				return nids, nil
			})
			var wg sync.WaitGroup
			var mu sync.Mutex
			answered := map[int64]bool{}
			for i := range int64(2000) {
				patience := time.Duration(random.IntN(30_000)) * time.Microsecond
				wg.Go(func() {
					ctx, cancel := context.WithTimeout(t.Context(), patience)
					defer cancel()
					nid, err := b.Do(ctx, question{nid: i})
					if err != nil {
						assert.ErrorIs(t, err, ErrNotAsked)
						return
					}
					assert.Equal(t, i, nid)
					mu.Lock()
					defer mu.Unlock()
					answered[i] = true
				})
				time.Sleep(time.Duration(random.IntN(50)) * time.Microsecond)
			}
			wg.Wait()
			require.NotEmpty(t, answered)
			require.Len(t, asked, len(answered), "each question that was asked has an answer")
			for nid, times := range asked {
				require.Equal(t, 1, times)
				require.True(t, answered[nid])
			}
		})
	}
}

// BenchmarkBatches measures the cost of a question in a large batch, with a database that costs nothing.
func BenchmarkBatches(b *testing.B) {
	for _, callers := range []int{1, 32, 128} {
		b.Run(fmt.Sprint(callers), func(b *testing.B) {
			batches := New(func(_ context.Context, refreshes []question) ([]bool, error) {
				runtime.Gosched()
				return make([]bool, len(refreshes)), nil
			})
			ctx, cancel := context.WithCancel(b.Context())
			defer cancel()
			b.ReportAllocs()
			b.SetParallelism(callers)
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					_, _ = batches.Do(ctx, question{nid: 1})
				}
			})
		})
	}
}

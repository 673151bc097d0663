package expiration

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"
	"github.com/stretchr/testify/require"
)

func TestRowsThatCouldNotBeDeleted(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		closed, dropped := w.message("!room", 10*time.Second), w.message("!room", time.Hour)
		w.store.set(false, func(operation string) error {
			if operation == "delete" || operation == "drop" {
				return errFault
			}
			return nil
		})
		require.NoError(t, w.End(t.Context(), w.hash(closed)), "the closing event is in the room")
		w.DropEvent(t.Context(), dropped.ID, Redacted)
		require.ErrorIs(t, w.Refresh(t.Context(), w.hash(dropped)), ErrNotFound)
		require.Equal(t, 2, w.store.len())
		time.Sleep(time.Minute)
		require.Error(t, w.DeleteStopped(t.Context()), "a crash could bring the dropped timer back")
		w.store.set(false, func(operation string) error {
			if operation == "delete" {
				return errFault
			}
			return nil
		})
		require.NoError(t, w.DeleteStopped(t.Context()), "the closed event stays closed")
		require.Equal(t, 1, w.store.len())
		w.store.set(false, nil)
		time.Sleep(time.Minute)
		require.Zero(t, w.store.len())
		require.NoError(t, w.DeleteStopped(t.Context()))
		w.wantClosings(closed)
		require.EqualValues(t, 1, testutil.ToFloat64(w.metrics.closings.WithLabelValues("ended")))
	})
}

// A write that fails may have happened. Its row must not come back with the next start.
func TestRowsThatNobodyKnowsOf(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		e := w.message("!room", 10*time.Second)
		failing := func(operation string) func(string) error {
			return func(o string) error {
				if o == operation {
					return errFault
				}
				return nil
			}
		}
		w.store.set(true, failing("insert"))
		_, err := w.Begin(t.Context(), Event{ID: "$refused", RoomID: "!room", Sender: "@alice:example.org"}, time.Second, false)
		require.ErrorIs(t, err, errFault)
		require.Equal(t, 1, w.store.len())

		w.store.set(true, failing("claim"))
		time.Sleep(10 * time.Second)
		synctest.Wait()
		w.DropEvent(t.Context(), e.ID, Redacted)
		require.Zero(t, w.store.len())
		w.restart(0)
		w.wantClosings()
	})
}

// The next timer of a room does not wait until the previous row is deleted.
func TestDeletionsHoldUpNobody(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		w.store.setDeleteTakes(10 * time.Second)
		first, second := w.message("!room", 10*time.Second), w.message("!room", 11*time.Second)
		time.Sleep(12 * time.Second)
		synctest.Wait()
		w.wantClosings(first, second)
		require.Equal(t, 2, w.store.len())
		time.Sleep(20 * time.Second)
		synctest.Wait()
		require.Zero(t, w.store.len())
	})
}

// The rows of a mass expiry are deleted together.
func TestDeletedTogether(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		deletions := 0
		w.store.set(false, func(operation string) error {
			if operation == "delete" {
				deletions++
			}
			return nil
		})
		for i := range 10 {
			w.message(fmt.Sprintf("!room%d", i%3), 10*time.Second)
		}
		time.Sleep(10 * time.Second)
		w.wantNoRows()
		require.Equal(t, 1, deletions)

		w.message("!room", 10*time.Second)
		time.Sleep(10 * time.Second)
		synctest.Wait()
		require.Equal(t, 1, w.store.len())
		stopping := time.Now()
		w.Stop()
		require.Zero(t, w.store.len(), "collected rows are deleted when the engine stops")
		require.Zero(t, time.Since(stopping), "stopping does not wait for more rows")
	})
}

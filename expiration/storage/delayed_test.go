package storage_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
)

// delayedTests are the tests of delayed events.
var delayedTests = []test{
	{"KeepsDelayedEvents", keepsDelayedEvents},
	{"ListsDelayedEventsWithoutContent", listsDelayedEvents},
	{"OneDelayedEventForARequest", oneDelayedEventForARequest},
	{"RefreshesAndClaimsDelayedEvents", refreshesAndClaimsDelayedEvents},
	{"FinalisesOnce", finalisesOnce},
	{"FinalisesWhatIsClaimedOnlyIfTold", finalisesClaimed},
	{"FinalisesNoExpiringEvent", finalisesNoExpiringEvent},
	{"OneOfManyEndsWins", oneEndWins},
	{"FinalisesAllOrNothing", finalisesAllOrNothing},
	{"KeepsTheLatestOfEachSender", keepsTheLatest},
	{"FindsSentEvents", findsSentEvents},
	{"ListsSendersOfSentEvents", listsSenders},
	{"FindsRequests", findsRequests},
	{"Prunes", prunes},
	{"Erases", erases},
}

// newDelayed returns the timer of a delayed event, with the names, hashes and times of newTimer(n).
func newDelayed(n int) expiration.Timer {
	t := newTimer(n)
	t.Event.ID = fmt.Sprintf("row%d", n)
	t.Event.Request.Signed = expiration.SignedEvent{EventID: t.Event.ID} // the event is not built yet
	t.Delayed = &expiration.Delayed{
		Content: fmt.Appendf(nil, `{ "n":%d, "\u0000":"ü" }`, n), Expires: time.Duration(n+1) * time.Minute,
		Timestamp: start.Add(-time.Hour), Service: n%2 == 1,
	}
	return t
}

// newFinal returns the result of newDelayed(n) if it is sent.
func newFinal(n int) expiration.Final {
	return expiration.Final{At: start.Add(time.Duration(n) * time.Minute), EventID: fmt.Sprintf("$sent%d", n)}
}

var (
	cancelled = expiration.Final{At: start}
	refused   = expiration.Final{At: start, Error: json.RawMessage(`{"errcode":"M_FORBIDDEN","error":"ü"}`)}
)

// insert inserts timers.
func insert(t *testing.T, store expiration.Store, timers ...expiration.Timer) {
	t.Helper()
	for _, timer := range timers {
		require.NoError(t, tryInsert(t.Context(), store, timer))
	}
}

// finalise calls Finalise for newDelayed(n), and requires the result want. The limit is so high that no finalised event is deleted.
func finalise(t *testing.T, store expiration.Store, n int, f expiration.Final, running, want bool) {
	t.Helper()
	done, err := store.Finalise(t.Context(), nid(n), f, running, 1000)
	require.NoError(t, err)
	require.Equal(t, want, done)
}

// wantFinalised requires that f is the stored result of newDelayed(n).
func wantFinalised(t *testing.T, store expiration.Store, n int, f expiration.Final) {
	t.Helper()
	want := newDelayed(n)
	want.NID, want.Event.Request = 0, nil
	want.Delayed = &expiration.Delayed{Content: want.Delayed.Content}
	got, err := store.Finalised(t.Context(), want.TokenHash)
	require.NoError(t, err)
	require.Equal(t, expiration.DelayedEvent{Timer: want, Final: &f}, got)
}

func keepsDelayedEvents(t *testing.T, open func() expiration.Store) {
	store := open()
	full, bare := newDelayed(1), newDelayed(2)
	bare.Event.StateKey, bare.Event.Request = nil, nil
	bare.Delayed = &expiration.Delayed{Content: []byte(`{}`)}
	expiring, early, first := newTimer(3), newDelayed(4), newDelayed(5)
	early.Delayed.Timestamp, first.Delayed.Timestamp = time.UnixMilli(1).UTC(), time.UnixMilli(0).UTC()
	insert(t, store, full, bare, expiring, early, first)
	store = open()
	for _, want := range []expiration.Timer{full, bare, expiring, early, first} {
		got, err := read(t.Context(), store, want.NID)
		require.NoError(t, err)
		require.Equal(t, want, got)
	}
}

func listsDelayedEvents(t *testing.T, open func() expiration.Store) {
	store := open()
	want := []expiration.Timer{newDelayed(1), newTimer(2), newDelayed(3)}
	insert(t, store, want...)
	ok, err := claim(t.Context(), store, nid(3), want[2].Deadline, newClaim(3))
	require.NoError(t, err)
	require.True(t, ok)
	want[2].Claim = &expiration.Claim{}
	require.Equal(t, []expiration.Indexed{indexed(want[0]), indexed(want[1]), indexed(want[2])}, index(t, open()))
}

func oneDelayedEventForARequest(t *testing.T, open func() expiration.Store) {
	store := open()
	insert(t, store, newDelayed(1))
	again := newDelayed(2)
	again.Event.Request.Hash = newDelayed(1).Event.Request.Hash
	require.Error(t, tryInsert(t.Context(), store, again))
	another, without, expiring := newDelayed(2), newDelayed(3), newTimer(4)
	without.Event.Request = nil
	expiring.Event.Request.Hash = newDelayed(1).Event.Request.Hash
	insert(t, store, another, without, expiring)
}

func refreshesAndClaimsDelayedEvents(t *testing.T, open func() expiration.Store) {
	store, ctx := open(), t.Context()
	timer := newDelayed(1)
	insert(t, store, timer)
	timer.Deadline = start.Add(time.Hour)
	ok, err := refresh(ctx, store, nid(1), timer.Duration, timer.Deadline)
	require.NoError(t, err)
	require.True(t, ok)
	ok, err = claim(ctx, store, nid(1), newDelayed(1).Deadline, newClaim(1))
	require.NoError(t, err)
	require.False(t, ok, "restarted since")
	ok, err = claim(ctx, store, nid(1), timer.Deadline, newClaim(1))
	require.NoError(t, err)
	require.True(t, ok)
	claim := newClaim(1)
	timer.Claim = &claim
	got, err := read(ctx, open(), nid(1))
	require.NoError(t, err)
	require.Equal(t, timer, got)
}

func finalisesOnce(t *testing.T, open func() expiration.Store) {
	store := open()
	for n, f := range []expiration.Final{newFinal(0), cancelled, refused} {
		insert(t, store, newDelayed(n))
		_, err := store.Finalised(t.Context(), newDelayed(n).TokenHash)
		require.ErrorIs(t, err, expiration.ErrNotFound)
		finalise(t, store, n, f, true, true)
		finalise(t, store, n, newFinal(7), true, false)
		finalise(t, store, n, newFinal(7), false, false)
	}
	store = open()
	for n, f := range []expiration.Final{newFinal(0), cancelled, refused} {
		wantFinalised(t, store, n, f)
		_, err := read(t.Context(), store, nid(n))
		require.ErrorIs(t, err, expiration.ErrNotFound)
	}
	require.Empty(t, list(t, store))
	message := newDelayed(3)
	message.Event.StateKey = nil
	insert(t, store, message)
	finalise(t, store, 3, cancelled, true, true)
	got, err := store.Finalised(t.Context(), message.TokenHash)
	require.NoError(t, err)
	require.Nil(t, got.Timer.Event.StateKey)
}

func finalisesClaimed(t *testing.T, open func() expiration.Store) {
	store := open()
	timer := newDelayed(1)
	insert(t, store, timer)
	ok, err := claim(t.Context(), store, nid(1), timer.Deadline, newClaim(1))
	require.NoError(t, err)
	require.True(t, ok)
	finalise(t, store, 1, cancelled, true, false)
	require.Equal(t, []string{"row1"}, list(t, store))
	_, err = store.Finalised(t.Context(), timer.TokenHash)
	require.ErrorIs(t, err, expiration.ErrNotFound)
	finalise(t, store, 1, newFinal(1), false, true)
	wantFinalised(t, open(), 1, newFinal(1))
	require.Empty(t, list(t, store))
}

func finalisesNoExpiringEvent(t *testing.T, open func() expiration.Store) {
	store := open()
	insert(t, store, newTimer(1))
	for _, running := range []bool{true, false} {
		finalise(t, store, 1, newFinal(1), running, false)
	}
	_, err := store.Finalised(t.Context(), newTimer(1).TokenHash)
	require.ErrorIs(t, err, expiration.ErrNotFound)
	require.Equal(t, []string{"$event1"}, list(t, store))
}

// When a delayed event is cancelled, restarted and claimed at the same time, either the cancellation or the claim succeeds. A claim and a
// restart do not both succeed.
func oneEndWins(t *testing.T, open func() expiration.Store) {
	store, ctx := open(), t.Context()
	for n := range 100 {
		timer := newDelayed(n)
		insert(t, store, timer)
		var wg sync.WaitGroup
		var done, claimed, refreshed bool
		try := func(won *bool, f func() (bool, error)) {
			wg.Go(func() {
				var err error
				if *won, err = f(); err != nil {
					t.Error(err)
				}
			})
		}
		try(&done, func() (bool, error) { return store.Finalise(ctx, nid(n), cancelled, true, 1000) })
		try(&claimed, func() (bool, error) { return claim(ctx, store, nid(n), timer.Deadline, newClaim(n)) })
		try(&refreshed, func() (bool, error) {
			return refresh(ctx, store, nid(n), timer.Duration, timer.Deadline.Add(time.Second))
		})
		wg.Wait()
		require.NotEqual(t, done, claimed, "one and only one must win")
		require.False(t, claimed && refreshed)
	}
}

func finalisesAllOrNothing(t *testing.T, open func() expiration.Store) {
	store := open()
	insert(t, store, newDelayed(1))
	finalise(t, store, 1, newFinal(1), true, true)
	again := newDelayed(1)
	again.Event.Request = nil
	insert(t, store, again)
	done, err := store.Finalise(t.Context(), nid(1), cancelled, true, 1000)
	require.Error(t, err, "its delay ID is taken")
	require.False(t, done)
	require.Equal(t, []string{"row1"}, list(t, store))
	wantFinalised(t, store, 1, newFinal(1))

	insert(t, store, newDelayed(2))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = store.Finalise(ctx, nid(2), cancelled, true, 1000)
	require.Error(t, err)
	finalise(t, store, 2, newFinal(2), true, true)
}

func keepsTheLatest(t *testing.T, open func() expiration.Store) {
	store := open()
	other := newDelayed(0)
	other.Event.Sender = "@bob:example.org"
	insert(t, store, other)
	finalise(t, store, 0, cancelled, true, true)
	for n := 1; n <= 5; n++ {
		insert(t, store, newDelayed(n))
		// The latest events are those of the last calls, whatever their times are.
		done, err := store.Finalise(t.Context(), nid(n), newFinal(-n), true, 2)
		require.NoError(t, err)
		require.True(t, done)
	}
	for n := range 6 {
		_, err := store.Finalised(t.Context(), newDelayed(n).TokenHash)
		if n == 0 || n > 3 {
			require.NoError(t, err)
		} else {
			require.ErrorIs(t, err, expiration.ErrNotFound)
		}
	}
}

func findsSentEvents(t *testing.T, open func() expiration.Store) {
	store := open()
	// These are more values than a database accepts as single parameters.
	var asked []string
	for n := range 1200 {
		asked = append(asked, newFinal(n).EventID)
	}
	want := map[string]string{}
	for _, n := range []int{0, 499, 500, 501, 1199} {
		timer := newDelayed(n)
		timer.Event.Request = nil // otherwise some of these timers would have the same request hash
		insert(t, store, timer)
		finalise(t, store, n, newFinal(n), true, true)
		want[newFinal(n).EventID] = timer.Event.ID
	}
	others, unasked := newDelayed(2), newDelayed(2000)
	others.Event.Sender = "@bob:example.org"
	unasked.Event.Request = nil
	insert(t, store, others, unasked, newDelayed(3))
	finalise(t, store, 2, newFinal(2), true, true)
	finalise(t, store, 2000, newFinal(2000), true, true)
	finalise(t, store, 3, cancelled, true, true)
	// What existed before is no delayed event, and of two rows with one event the first counts.
	for n, f := range map[int]expiration.Final{
		10: {At: start, EventID: "$sent10", Existed: true}, 11: {At: start, EventID: newFinal(0).EventID},
	} {
		timer := newDelayed(n)
		timer.Event.Request = nil
		insert(t, store, timer)
		finalise(t, store, n, f, true, true)
		wantFinalised(t, store, n, f)
	}
	got, err := open().FinalisedAs(t.Context(), "@alice:example.org", asked)
	require.NoError(t, err)
	require.Equal(t, want, got)
	got, err = store.FinalisedAs(t.Context(), "@bob:example.org", asked)
	require.NoError(t, err)
	require.Equal(t, map[string]string{"$sent2": "row2"}, got)
	for _, none := range [][]string{nil, {"$unknown"}} {
		got, err = store.FinalisedAs(t.Context(), "@alice:example.org", none)
		require.NoError(t, err)
		require.Empty(t, got)
	}
}

func listsSenders(t *testing.T, open func() expiration.Store) {
	store := open()
	for n, sender := range []string{"@a", "@b", "@b", "@c", "@d"} {
		timer := newDelayed(n)
		timer.Event.Sender = sender
		insert(t, store, timer)
	}
	finalise(t, store, 0, newFinal(0), true, true)
	finalise(t, store, 1, newFinal(1), true, true)
	finalise(t, store, 2, newFinal(2), true, true)
	finalise(t, store, 3, cancelled, true, true)
	senders, err := open().FinalisedSenders(t.Context())
	require.NoError(t, err)
	require.ElementsMatch(t, []string{"@a", "@b"}, senders)
}

func findsRequests(t *testing.T, open func() expiration.Store) {
	store := open()
	want := func(n int, rowID string) {
		t.Helper()
		got, err := open().Requested(t.Context(), newDelayed(n).Event.Request.Hash)
		if rowID == "" {
			require.ErrorIs(t, err, expiration.ErrNotFound)
			return
		}
		require.NoError(t, err)
		require.Equal(t, rowID, got)
	}
	want(1, "")
	insert(t, store, newDelayed(1), newDelayed(2), newTimer(3))
	want(1, "row1")
	want(2, "row2")
	want(3, "")
	finalise(t, store, 1, newFinal(1), true, true)
	want(1, "row1")
	require.NoError(t, store.Prune(t.Context(), newFinal(1).At.Add(time.Millisecond)))
	want(1, "")
	want(2, "row2")
}

func erases(t *testing.T, open func() expiration.Store) {
	store := open()
	for n := range 4 {
		timer := newDelayed(n)
		timer.Event.Sender = []string{"@a", "@b"}[n%2]
		insert(t, store, timer)
	}
	for n := range 3 {
		finalise(t, store, n, newFinal(n), true, true)
	}
	require.NoError(t, store.Erase(t.Context(), "@a"))
	for n := range 3 {
		_, err := open().Finalised(t.Context(), newDelayed(n).TokenHash)
		require.Equal(t, n != 1, errors.Is(err, expiration.ErrNotFound))
	}
	require.Equal(t, []string{"row3"}, list(t, store))
}

func prunes(t *testing.T, open func() expiration.Store) {
	store := open()
	for n := range 4 {
		insert(t, store, newDelayed(n))
	}
	for n := range 3 {
		finalise(t, store, n, newFinal(n), true, true)
	}
	require.NoError(t, store.Prune(t.Context(), newFinal(1).At))
	_, err := open().Finalised(t.Context(), newDelayed(0).TokenHash)
	require.ErrorIs(t, err, expiration.ErrNotFound)
	wantFinalised(t, store, 1, newFinal(1))
	wantFinalised(t, store, 2, newFinal(2))
	require.Equal(t, []string{"row3"}, list(t, store))
}

package storage_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
)

// test is one test of the conformance suite of expiration.Store, which both databases must pass. The first call of open opens an empty
// database, and later calls open it again, with connections and prepared statements of their own.
type test struct {
	name string
	run  func(t *testing.T, open func() expiration.Store)
}

var expiringTests = []test{
	{"KeepsWhatWasInserted", keepsWhatWasInserted},
	{"RefusesASecondTimerForAnEvent", refusesASecondTimer},
	{"ListsAll", listsAll},
	{"ListingStopsAtAnError", listingStops},
	{"RefreshesRunningTimersOnly", refreshesRunningTimersOnly},
	{"RefreshesManyAtOnce", refreshesMany},
	{"ClaimsOnceAndOnlyAsSeen", claimsOnce},
	{"ClaimsManyAtOnce", claimsMany},
	{"OneOfManyClaimsWins", oneClaimWins},
	{"RefreshAndClaimExcludeEachOther", refreshOrClaim},
	{"DoubtTakesTheDigest", doubtTakesTheDigest},
	{"DropSparesClaimedTimers", dropSparesClaimed},
	{"DropAndClaimExcludeEachOther", dropOrClaim},
	{"ObeysContext", obeysContext},
	{"Pings", pings},
}

var start = time.UnixMilli(1_700_000_000_123).UTC()

// newTimer returns a timer with a value in every field, different for each n.
func newTimer(n int) expiration.Timer {
	stateKey := fmt.Sprintf("_@alice:example.org_DEVICE%d", n)
	t := expiration.Timer{
		NID: nid(n),
		Event: expiration.Event{
			ID: fmt.Sprintf("$event%d", n), RoomID: "!room:example.org", Type: "m.call.member",
			StateKey: &stateKey, Sender: "@alice:example.org",
		},
		TokenHash: expiration.HashToken(fmt.Sprint(n)),
		Duration:  10 * time.Second,
		Received:  start,
		Deadline:  start.Add(time.Duration(n) * time.Second),
	}
	t.Event.Request = &expiration.Request{
		Hash:   expiration.RequestHash{1, byte(n)},
		Signed: expiration.SignedEvent{EventID: t.Event.ID, RoomVersion: "11", PDU: []byte(`{"content":{"\u0000":"ü"}}`)},
	}
	return t
}

// newDigest returns a digest whose bytes all differ from one another.
func newDigest(n int) (d expiration.Digest) {
	for i := range d {
		d[i] = byte(n + i)
	}
	return d
}

func tryInsert(ctx context.Context, store expiration.Store, t expiration.Timer) error {
	return store.Insert(ctx, t, newDigest(int(t.NID)))
}

// nid returns the number of newTimer(n).
func nid(n int) int64 { return int64(n) + 1 }

// newClaim returns a claim with an event whose length depends on n.
func newClaim(n int) expiration.Claim {
	return expiration.Claim{Outcome: expiration.Expired, Event: expiration.SignedEvent{
		EventID: fmt.Sprintf("$closing%d", n), RoomVersion: "10",
		PDU: fmt.Appendf(nil, `{"type":"m.call.member","x":"%s\u0000%d"}`, strings.Repeat("ü", n%7), n),
	}}
}

func keepsWhatWasInserted(t *testing.T, open func() expiration.Store) {
	store, ctx := open(), t.Context()
	withState, message, emptyKey := newTimer(1), newTimer(2), newTimer(3)
	message.Event.StateKey = nil
	empty := ""
	emptyKey.Event.StateKey = &empty
	emptyKey.Event.Request = nil
	for _, timer := range []expiration.Timer{withState, message, emptyKey} {
		require.NoError(t, tryInsert(ctx, store, timer))
	}
	store = open()
	for _, want := range []expiration.Timer{withState, message, emptyKey} {
		got, err := read(ctx, store, want.NID)
		require.NoError(t, err)
		require.Equal(t, want, got)
	}
	_, err := read(ctx, store, nid(99))
	require.ErrorIs(t, err, expiration.ErrNotFound)
	several, err := store.Read(ctx, []int64{message.NID, nid(99), withState.NID})
	require.NoError(t, err)
	require.Equal(t, []*expiration.Timer{&message, nil, &withState}, several)
	several, err = store.Read(ctx, nil)
	require.NoError(t, err)
	require.Empty(t, several)
}

func refusesASecondTimer(t *testing.T, open func() expiration.Store) {
	store, ctx := open(), t.Context()
	require.NoError(t, tryInsert(ctx, store, newTimer(1)))
	again := newTimer(1)
	again.NID = nid(2)
	require.Error(t, tryInsert(ctx, store, again))
	again = newTimer(2)
	again.NID = nid(1)
	require.Error(t, tryInsert(ctx, store, again), "the same number")
	// The store works on after these errors.
	require.NoError(t, tryInsert(ctx, store, newTimer(2)))
}

func list(t *testing.T, store expiration.Store) (ids []string) {
	for _, row := range index(t, store) {
		timer, err := read(t.Context(), store, row.NID)
		require.NoError(t, err)
		ids = append(ids, timer.Event.ID)
	}
	return ids
}

// index returns what the start reads, sorted by number.
func index(t *testing.T, store expiration.Store) (rows []expiration.Indexed) {
	require.NoError(t, store.Index(t.Context(), func(row expiration.Indexed) error {
		rows = append(rows, row)
		return nil
	}))
	slices.SortFunc(rows, func(a, b expiration.Indexed) int { return int(a.NID - b.NID) })
	return rows
}

// indexed returns what the start reads for a timer that was inserted by tryInsert.
func indexed(t expiration.Timer) expiration.Indexed {
	return expiration.Indexed{
		NID: t.NID, Digest: newDigest(int(t.NID)), Claimed: t.Claim != nil, Duration: t.Duration, Deadline: t.Deadline,
	}
}

func listsAll(t *testing.T, open func() expiration.Store) {
	store, ctx := open(), t.Context()
	require.Empty(t, list(t, store))
	for _, n := range []int{3, 1, 2} {
		require.NoError(t, tryInsert(ctx, store, newTimer(n)))
	}
	claimTimer(t, store, 2)
	require.Equal(t, []string{"$event1", "$event2", "$event3"}, list(t, open()))
	for _, got := range index(t, store) {
		timer, err := read(ctx, store, got.NID)
		require.NoError(t, err)
		require.Equal(t, indexed(timer), got)
	}
	ok, err := refresh(ctx, store, nid(1), 10*time.Second, start.Add(time.Hour))
	require.NoError(t, err)
	require.True(t, ok)
	require.Equal(t, []string{"$event1", "$event2", "$event3"}, list(t, store))
}

func doubtTakesTheDigest(t *testing.T, open func() expiration.Store) {
	store, ctx := open(), t.Context()
	for n := range 3 {
		require.NoError(t, tryInsert(ctx, store, newTimer(n)))
	}
	require.NoError(t, store.Doubt(ctx, []int64{nid(0), nid(2), nid(99)}))
	require.NoError(t, store.Doubt(ctx, []int64{nid(0)}))
	store = open()
	for n, row := range index(t, store) {
		want := indexed(newTimer(n))
		if n != 1 {
			want.Digest = expiration.Digest{}
		}
		require.Equal(t, want, row)
		timer, err := read(ctx, store, nid(n))
		require.NoError(t, err)
		require.Equal(t, newTimer(n), timer)
	}
	require.NoError(t, store.Drop(ctx, []int64{nid(0), nid(1)}))
	require.NoError(t, store.Delete(ctx, []int64{nid(2)}))
	require.Empty(t, index(t, store))
}

func listingStops(t *testing.T, open func() expiration.Store) {
	store, ctx := open(), t.Context()
	require.NoError(t, tryInsert(ctx, store, newTimer(1)))
	require.NoError(t, tryInsert(ctx, store, newTimer(2)))
	stop, calls := errors.New("stop"), 0
	require.ErrorIs(t, store.Index(ctx, func(expiration.Indexed) error { calls++; return stop }), stop)
	require.Equal(t, 1, calls)
}

func refreshesRunningTimersOnly(t *testing.T, open func() expiration.Store) {
	store, ctx := open(), t.Context()
	deadline := start.Add(time.Hour)
	refresh := func(want bool) {
		t.Helper()
		ok, err := refresh(ctx, store, nid(1), 7*time.Second, deadline)
		require.NoError(t, err)
		require.Equal(t, want, ok)
	}
	refresh(false)
	require.NoError(t, tryInsert(ctx, store, newTimer(1)))
	refresh(true)
	got, err := read(ctx, open(), nid(1))
	require.NoError(t, err)
	require.Equal(t, deadline, got.Deadline)
	require.Equal(t, 7*time.Second, got.Duration)
	ok, err := claim(ctx, store, nid(1), deadline, newClaim(1))
	require.NoError(t, err)
	require.True(t, ok)
	refresh(false)
	got, err = read(ctx, store, nid(1))
	require.NoError(t, err)
	require.Equal(t, deadline, got.Deadline)
}

// refresh refreshes one timer.
func refresh(ctx context.Context, store expiration.Store, nid int64, duration time.Duration, deadline time.Time) (bool, error) {
	found, err := store.Refresh(ctx, []expiration.Refresh{{NID: nid, Duration: duration, Deadline: deadline}})
	return err == nil && found[0], err
}

// read returns one timer, or expiration.ErrNotFound.
func read(ctx context.Context, store expiration.Store, nid int64) (expiration.Timer, error) {
	found, err := store.Read(ctx, []int64{nid})
	switch {
	case err != nil:
		return expiration.Timer{}, err
	case found[0] == nil:
		return expiration.Timer{}, expiration.ErrNotFound
	}
	return *found[0], nil
}

// claim claims one timer.
func claim(ctx context.Context, store expiration.Store, nid int64, deadline time.Time, c expiration.Claim) (bool, error) {
	found, err := store.Claim(ctx, []expiration.ConditionalClaim{{NID: nid, Deadline: deadline, Claim: c}})
	return err == nil && found[0], err
}

// claimTimer claims newTimer(n).
func claimTimer(t *testing.T, store expiration.Store, n int) {
	t.Helper()
	ok, err := claim(t.Context(), store, nid(n), newTimer(n).Deadline, newClaim(n))
	require.NoError(t, err)
	require.True(t, ok)
}

func refreshesMany(t *testing.T, open func() expiration.Store) {
	const many = 600
	store, ctx := open(), t.Context()
	var refreshes []expiration.Refresh
	var want []bool
	for n := range many {
		timer := newTimer(n)
		// Every third timer is missing, and every fifth is claimed.
		missing, claimed := n%3 == 0, n%5 == 0
		if !missing {
			require.NoError(t, tryInsert(ctx, store, timer))
		}
		if !missing && claimed {
			claimTimer(t, store, n)
		}
		refreshes = append(refreshes, expiration.Refresh{
			NID: timer.NID, Duration: time.Duration(n+1) * time.Second, Deadline: start.Add(time.Duration(n) * time.Hour),
		})
		want = append(want, !missing && !claimed)
	}
	found, err := store.Refresh(ctx, refreshes)
	require.NoError(t, err)
	require.Equal(t, want, found)
	store = open()
	for n, r := range refreshes {
		timer, err := read(ctx, store, r.NID)
		if !want[n] {
			require.False(t, timer.Deadline.Equal(r.Deadline) && n > 0)
			continue
		}
		require.NoError(t, err)
		require.Equal(t, r.Duration, timer.Duration)
		require.True(t, r.Deadline.Equal(timer.Deadline))
	}
	found, err = store.Refresh(ctx, nil)
	require.NoError(t, err)
	require.Empty(t, found)
}

func claimsOnce(t *testing.T, open func() expiration.Store) {
	store, ctx := open(), t.Context()
	timer := newTimer(1)
	claims := func(deadline time.Time, c expiration.Claim) bool {
		t.Helper()
		ok, err := claim(ctx, store, timer.NID, deadline, c)
		require.NoError(t, err)
		return ok
	}
	require.False(t, claims(timer.Deadline, newClaim(1)), "no timer")
	require.NoError(t, tryInsert(ctx, store, timer))
	require.NoError(t, tryInsert(ctx, store, newTimer(2)))
	require.False(t, claims(timer.Deadline.Add(time.Millisecond), newClaim(1)), "another deadline")
	require.False(t, claims(timer.Deadline.Add(-time.Millisecond), newClaim(1)), "another deadline")
	require.True(t, claims(timer.Deadline, newClaim(1)))
	require.False(t, claims(timer.Deadline, newClaim(2)), "claimed already")
	timer.Claim = new(expiration.Claim)
	*timer.Claim = newClaim(1)
	got, err := read(ctx, open(), timer.NID)
	require.NoError(t, err)
	require.Equal(t, timer, got)
	got, err = read(ctx, store, nid(2))
	require.NoError(t, err)
	require.Nil(t, got.Claim, "somebody else's timer was claimed")
}

func claimsMany(t *testing.T, open func() expiration.Store) {
	const many = 600
	store, ctx := open(), t.Context()
	var claims []expiration.ConditionalClaim
	var want []bool
	for n := range many {
		timer := newTimer(n)
		// Every third timer is missing, every fifth was refreshed, and every seventh is claimed.
		missing, refreshed, claimed := n%3 == 0, n%5 == 0, n%7 == 0
		if !missing {
			require.NoError(t, tryInsert(ctx, store, timer))
		}
		if !missing && claimed {
			claimTimer(t, store, n)
		}
		if refreshed {
			timer.Deadline = timer.Deadline.Add(-time.Second)
		}
		claims = append(claims, expiration.ConditionalClaim{NID: timer.NID, Deadline: timer.Deadline, Claim: newClaim(many + n)})
		want = append(want, !missing && !refreshed && !claimed)
	}
	found, err := store.Claim(ctx, claims)
	require.NoError(t, err)
	require.Equal(t, want, found)
	store = open()
	for n, c := range claims {
		timer, err := read(ctx, store, c.NID)
		if want[n] {
			require.NoError(t, err)
			require.Equal(t, c.Claim, *timer.Claim)
		} else if err == nil && timer.Claim != nil {
			require.Equal(t, newClaim(n), *timer.Claim)
		}
	}
	found, err = store.Claim(ctx, nil)
	require.NoError(t, err)
	require.Empty(t, found)
}

func oneClaimWins(t *testing.T, open func() expiration.Store) {
	store, ctx := open(), t.Context()
	timer := newTimer(1)
	require.NoError(t, tryInsert(ctx, store, timer))
	var (
		wg   sync.WaitGroup
		wins atomic.Int64
		won  atomic.Int64
	)
	for n := range 20 {
		wg.Go(func() {
			ok, err := claim(ctx, store, timer.NID, timer.Deadline, newClaim(n))
			if err != nil {
				t.Error(err)
			}
			if ok {
				wins.Add(1)
				won.Store(int64(n))
			}
		})
	}
	wg.Wait()
	require.EqualValues(t, 1, wins.Load())
	got, err := read(ctx, store, timer.NID)
	require.NoError(t, err)
	require.Equal(t, newClaim(int(won.Load())), *got.Claim)
}

func refreshOrClaim(t *testing.T, open func() expiration.Store) {
	store, ctx := open(), t.Context()
	for n := range 20 {
		timer := newTimer(n)
		require.NoError(t, tryInsert(ctx, store, timer))
		var (
			wg                 sync.WaitGroup
			refreshed, claimed bool
		)
		wg.Go(func() {
			var err error
			if refreshed, err = refresh(ctx, store, timer.NID, timer.Duration, timer.Deadline.Add(time.Second)); err != nil {
				t.Error(err)
			}
		})
		wg.Go(func() {
			var err error
			if claimed, err = claim(ctx, store, timer.NID, timer.Deadline, newClaim(n)); err != nil {
				t.Error(err)
			}
		})
		wg.Wait()
		require.NotEqual(t, refreshed, claimed, "one and only one must win")
	}
}

func dropSparesClaimed(t *testing.T, open func() expiration.Store) {
	store, ctx := open(), t.Context()
	for n := range 8 {
		require.NoError(t, tryInsert(ctx, store, newTimer(n)))
	}
	for _, n := range []int{0, 1, 4, 5} {
		claimTimer(t, store, n)
	}
	require.NoError(t, store.Drop(ctx, []int64{nid(0)}), "claimed: stays")
	require.NoError(t, store.Delete(ctx, []int64{nid(1)}), "claimed: goes")
	require.NoError(t, store.Drop(ctx, []int64{nid(2)}), "running: goes")
	require.Equal(t, []string{"$event0", "$event3", "$event4", "$event5", "$event6", "$event7"}, list(t, open()))
	require.NoError(t, store.Delete(ctx, []int64{nid(3)}), "running: goes")
	require.NoError(t, store.Delete(ctx, []int64{nid(3)}), "a second time: no error")
	require.NoError(t, store.Drop(ctx, []int64{nid(3)}))
	require.Equal(t, []string{"$event0", "$event4", "$event5", "$event6", "$event7"}, list(t, open()))
	require.NoError(t, store.Drop(ctx, []int64{nid(4), nid(6), nid(8)}), "some claimed, some running, some not there")
	require.Equal(t, []string{"$event0", "$event4", "$event5", "$event7"}, list(t, open()))
	require.NoError(t, store.Delete(ctx, []int64{nid(5), nid(7), nid(8)}))
	require.Equal(t, []string{"$event0", "$event4"}, list(t, open()))
	require.NoError(t, store.Drop(ctx, nil))
	require.NoError(t, store.Delete(ctx, nil))
}

// Of a drop and a claim of the same timer, exactly one wins. A removed timer leaves no rows behind.
func dropOrClaim(t *testing.T, open func() expiration.Store) {
	store, ctx := open(), t.Context()
	for n := range 20 {
		timer := newTimer(n)
		require.NoError(t, tryInsert(ctx, store, timer))
		var (
			wg      sync.WaitGroup
			claimed bool
		)
		wg.Go(func() {
			if err := store.Drop(ctx, []int64{timer.NID}); err != nil {
				t.Error(err)
			}
		})
		wg.Go(func() {
			var err error
			if claimed, err = claim(ctx, store, timer.NID, timer.Deadline, newClaim(n)); err != nil {
				t.Error(err)
			}
		})
		wg.Wait()
		got, err := read(ctx, store, timer.NID)
		if claimed {
			require.NoError(t, err)
			require.Equal(t, newClaim(n), *got.Claim)
			require.NoError(t, store.Delete(ctx, []int64{timer.NID}))
		} else {
			require.ErrorIs(t, err, expiration.ErrNotFound)
		}
		require.NoError(t, tryInsert(ctx, store, timer), "nothing is left of it")
		claimTimer(t, store, n)
		require.NoError(t, store.Delete(ctx, []int64{timer.NID}))
	}
}

func obeysContext(t *testing.T, open func() expiration.Store) {
	store := open()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	require.Error(t, tryInsert(ctx, store, newTimer(1)))
	_, err := refresh(ctx, store, nid(1), time.Second, start)
	require.Error(t, err)
	require.Error(t, store.Ping(ctx))
	require.Empty(t, list(t, store))
	require.NoError(t, tryInsert(t.Context(), store, newTimer(1)), "goes on working")
}

func pings(t *testing.T, open func() expiration.Store) {
	store := open()
	require.NoError(t, store.Ping(t.Context()))
	require.NoError(t, tryInsert(t.Context(), store, newTimer(1)))
	require.NoError(t, store.Ping(t.Context()))
}

package storage_test

import (
	"cmp"
	"database/sql"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
)

// delegationTests are the tests of delegations.
var delegationTests = []test{
	{"KeepsDelegations", keepsDelegations},
	{"DelegatesRunningTimersOnly", delegatesRunningTimersOnly},
	{"ReplacesTheDelegationOfAMember", replacesDelegations},
	{"NotesSessions", notesSessions},
	{"DelegationsGoWithTheirTimers", delegationsGoWithTheirTimers},
}

// newDelegation returns the delegation of a timer, with a value in every field, different for each n.
func newDelegation(timer expiration.Timer, n int) expiration.Delegation {
	return expiration.Delegation{
		NID: timer.NID, Kept: expiration.Kept{Hash: timer.TokenHash, Delayed: timer.Delayed != nil},
		UserID: timer.Event.Sender, RoomID: timer.Event.RoomID, Duration: timer.Duration, MemberKey: [32]byte{1, byte(n)},
		Room: fmt.Sprintf("room%d", n), Identity: fmt.Sprintf("@ü:example.org:DEVICE%d", n),
		Taken: start.Add(time.Duration(n) * time.Second), Seen: start.Add(time.Duration(n) * time.Minute),
		RoomSID: fmt.Sprintf("RM_%d", n), Phase: expiration.DelegationConnected,
	}
}

// delegate stores delegations, and requires that their timers run.
func delegate(t *testing.T, store expiration.Store, delegations ...expiration.Delegation) {
	t.Helper()
	for _, d := range delegations {
		running, err := store.Delegate(t.Context(), d)
		require.NoError(t, err)
		require.True(t, running)
	}
}

// wantDelegations requires that the store returns these delegations.
func wantDelegations(t *testing.T, store expiration.Store, want ...expiration.Delegation) {
	t.Helper()
	got, err := store.Delegations(t.Context())
	require.NoError(t, err)
	slices.SortFunc(got, func(a, b expiration.Delegation) int { return cmp.Compare(a.NID, b.NID) })
	require.Equal(t, want, got)
}

// kept returns the numbers of the timers that have a delegation.
func kept(t *testing.T, store expiration.Store) (nids []int64) {
	t.Helper()
	for _, row := range index(t, store) {
		if row.Kept {
			nids = append(nids, row.NID)
		}
	}
	return nids
}

func keepsDelegations(t *testing.T, open func() expiration.Store) {
	store := open()
	expiring, without, delayed := newTimer(1), newTimer(2), newDelayed(3)
	insert(t, store, expiring, without, delayed)
	full, bare := newDelegation(expiring, 1), newDelegation(delayed, 2)
	bare.MemberKey, bare.Seen, bare.RoomSID, bare.Phase = [32]byte{}, time.Time{}, "", expiration.DelegationWaiting
	delegate(t, store, full, bare)
	store = open()
	wantDelegations(t, store, full, bare)
	require.Equal(t, []int64{expiring.NID, delayed.NID}, kept(t, store))

	ok, err := refresh(t.Context(), store, expiring.NID, time.Hour, start.Add(time.Hour))
	require.NoError(t, err)
	require.True(t, ok)
	full.Duration = time.Hour
	wantDelegations(t, store, full, bare)
	again := newDelegation(expiring, 3)
	again.Duration = time.Hour
	delegate(t, store, again)
	wantDelegations(t, store, again, bare)
}

func delegatesRunningTimersOnly(t *testing.T, open func() expiration.Store) {
	store := open()
	running, claimed := newTimer(1), newTimer(2)
	insert(t, store, running, claimed)
	first := newDelegation(running, 1)
	delegate(t, store, first)
	claimTimer(t, store, 2)
	for _, timer := range []expiration.Timer{claimed, newTimer(3)} {
		d := newDelegation(timer, 2)
		d.MemberKey = first.MemberKey
		ok, err := store.Delegate(t.Context(), d)
		require.NoError(t, err)
		require.False(t, ok)
		wantDelegations(t, store, first) // nothing was replaced either
	}
	claimTimer(t, store, 1)
	wantDelegations(t, open())
	require.Equal(t, []int64{running.NID}, kept(t, store))
}

func replacesDelegations(t *testing.T, open func() expiration.Store) {
	store := open()
	timers := []expiration.Timer{newTimer(1), newTimer(2), newTimer(3), newTimer(4)}
	insert(t, store, timers...)
	older, newer, other, none := newDelegation(timers[0], 1), newDelegation(timers[1], 1), newDelegation(timers[2], 3), newDelegation(timers[3], 4)
	none.MemberKey = [32]byte{}
	delegate(t, store, older, other, none, newer, newer)
	wantDelegations(t, open(), newer, other, none)
	another := newDelegation(timers[0], 5)
	another.MemberKey = [32]byte{}
	delegate(t, store, another)
	wantDelegations(t, store, another, newer, other, none)
	delegate(t, store, older) // the oldest timer, but the newest delegation
	wantDelegations(t, store, older, other, none)
}

func notesSessions(t *testing.T, open func() expiration.Store) {
	store := open()
	insert(t, store, newTimer(1), newTimer(2), newTimer(3))
	delegations := []expiration.Delegation{newDelegation(newTimer(1), 1), newDelegation(newTimer(2), 2)}
	delegate(t, store, delegations...)
	note := func(n int) expiration.SessionNote {
		return expiration.SessionNote{
			NID: nid(n), Seen: start.Add(time.Duration(n) * time.Hour), RoomSID: fmt.Sprintf("RM_new%d", n), Phase: expiration.DelegationGone,
		}
	}
	never := expiration.SessionNote{NID: nid(2), Phase: expiration.DelegationWaiting}
	require.NoError(t, store.NoteSessions(t.Context(), []expiration.SessionNote{note(1), note(3), never, note(4)}))
	for i, n := range []expiration.SessionNote{note(1), never} {
		delegations[i].Seen, delegations[i].RoomSID, delegations[i].Phase = n.Seen, n.RoomSID, n.Phase
	}
	wantDelegations(t, open(), delegations...)
	require.NoError(t, store.NoteSessions(t.Context(), nil))
}

func delegationsGoWithTheirTimers(t *testing.T, open func() expiration.Store) {
	store, ctx := open(), t.Context()
	for n, remove := range []func(nids []int64) error{
		func(nids []int64) error { return store.Drop(ctx, nids) },
		func(nids []int64) error { return store.Delete(ctx, nids) },
		func(nids []int64) error {
			done, err := store.Finalise(ctx, nids[0], newFinal(2), true, 1000)
			require.True(t, done)
			return err
		},
	} {
		timer, stays := newDelayed(n), newTimer(10+n)
		insert(t, store, timer, stays)
		delegate(t, store, newDelegation(timer, n), newDelegation(stays, 10+n))
		require.NoError(t, remove([]int64{timer.NID}))
		wantDelegations(t, store, newDelegation(stays, 10+n))
		again := newTimer(20 + n)
		again.NID = timer.NID
		insert(t, store, again)
		require.Equal(t, []int64{stays.NID}, kept(t, open()), "nothing is left of it")
		require.NoError(t, store.Delete(ctx, []int64{timer.NID, stays.NID}))
	}

	// What spares a claimed timer spares its delegation.
	timer := newDelayed(4)
	insert(t, store, timer)
	delegate(t, store, newDelegation(timer, 4))
	claimTimer(t, store, 4)
	require.NoError(t, store.Drop(ctx, []int64{timer.NID}))
	done, err := store.Finalise(ctx, timer.NID, newFinal(4), true, 1000)
	require.NoError(t, err)
	require.False(t, done)
	require.Equal(t, []int64{timer.NID}, kept(t, store))
	require.NoError(t, store.Delete(ctx, []int64{timer.NID}))
	insert(t, store, timer)
	require.Empty(t, kept(t, store))
}

// A delegation whose timer was removed without it is not the delegation of a later timer that has the same number.
func numbersAreUsedAgain(t *testing.T, db *sql.DB, open func() (expiration.Store, error)) {
	store, err := open()
	require.NoError(t, err)
	insert(t, store, newTimer(1))
	delegate(t, store, newDelegation(newTimer(1), 1))
	for _, table := range []string{"timers", "deadlines", "digests"} {
		_, err = db.ExecContext(t.Context(), "DELETE FROM expiration_"+table)
		require.NoError(t, err)
	}
	later := newTimer(2)
	later.NID = nid(1)
	insert(t, store, later)
	wantDelegations(t, store)
	delegate(t, store, newDelegation(later, 1))
	wantDelegations(t, store, newDelegation(later, 1))
}

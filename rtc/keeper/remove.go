package keeper

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/guard"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/rtc/livekit"
)

// Who may be at LiveKit. A participant who is not joined to the room of Matrix is removed. A removed client can connect again as long as it
// has a valid token, so for some minutes its participant is removed again and again. LiveKit gives everybody who connects a new token, so
// the participant is remembered for a week after that, and removed whenever LiveKit reports it.

// Store remembers for whom tokens were made.
type Store interface {
	// Remember adds a member, or replaces it. The member then does not count as leaving.
	Remember(ctx context.Context, m expiration.Member) error
	MembersOf(ctx context.Context, roomID, userID string) ([]expiration.Member, error)
	// MemberAt returns the member with a name at LiveKit, or expiration.ErrNotFound.
	MemberAt(ctx context.Context, room, identity string) (expiration.Member, error)
	// MarkLeaving notes durably that a user has left a room.
	MarkLeaving(ctx context.Context, roomID, userID string) error
	Leaving(ctx context.Context) ([]expiration.Member, error)
	// Forget deletes a member, unless it was remembered again.
	Forget(ctx context.Context, m expiration.Member) error
	// Prune deletes the members that were remembered before a time and are not leaving.
	Prune(ctx context.Context, before time.Time) error
}

// Rooms is what is asked of Matrix.
type Rooms interface {
	Joined(ctx context.Context, roomID, userID string) (bool, error)
}

const (
	// tokenLife is for how long a token can be used after a removal: the token's own validity, that of a renewal by LiveKit, and LiveKit's
	// leeway for clocks are below it.
	tokenLife = 15 * time.Minute
	// removeInterval is how often a participant is removed again in that time.
	removeInterval = time.Minute
	// pruneInterval is how often members are forgotten who were remembered longer than rememberedFor ago. Those who are connected are
	// remembered again each rememberInterval.
	pruneInterval    = time.Hour
	rememberedFor    = 7 * 24 * time.Hour
	rememberInterval = 24 * time.Hour
	// maxIdentities is how many names at LiveKit a user may have for one room in rememberedFor.
	maxIdentities = 1000
	// maxJoined bounds the participants whose membership is still to be looked at. For any more the next look has to do.
	maxJoined = 10_000
	// maxRemovals is how many participants are removed before the remover looks who else has left.
	maxRemovals = 100
	// maxFailures is how many participants may fail before the others wait too.
	maxFailures = 3
	// removeTimeout bounds what the remover does for one participant.
	removeTimeout = 30 * time.Second
)

var (
	// ErrNotJoined: the user is not joined to the room.
	ErrNotJoined = errors.New("the user is not joined to the room")
	// ErrTooMany: the user has too many names at LiveKit for one room.
	ErrTooMany = errors.New("too many participants of one user")
)

// Remember notes durably for whom a token is about to be made, so that the participant can be removed when the user leaves the room. Without
// it no token may be given away. The error is ErrNotJoined, ErrTooMany, ErrCrowded, or passing.
func (k *Keeper) Remember(ctx context.Context, m expiration.Member) error {
	if err := k.mustBeJoined(ctx, m); err != nil {
		return err
	}
	leave, err := k.users.Lock(ctx, m.UserID) // nobody else counts the user's names meanwhile
	if err != nil {
		return err
	}
	defer leave()
	others, err := k.store.MembersOf(ctx, m.RoomID, m.UserID)
	if err != nil {
		return fmt.Errorf("reading the participants of a user: %w", err)
	}
	others = slices.DeleteFunc(others, func(o expiration.Member) bool { return o.Room == m.Room && o.Identity == m.Identity })
	if len(others) >= maxIdentities {
		return ErrTooMany
	}
	return k.remember(ctx, m)
}

// remember is Remember for a member whose user is joined, or was a moment ago, and who may have one name more.
func (k *Keeper) remember(ctx context.Context, m expiration.Member) error {
	m.Made = k.wall().Truncate(time.Millisecond)
	if err := k.store.Remember(ctx, m); err != nil {
		return fmt.Errorf("remembering a participant: %w", err)
	}
	// A user who was kicked meanwhile does not count as leaving any more.
	err := k.mustBeJoined(ctx, m)
	if err != nil {
		k.mu.Lock()
		defer k.mu.Unlock()
		k.joinedWithMu(livekit.Participant{Room: m.Room, Identity: m.Identity})
	}
	return err
}

func (k *Keeper) mustBeJoined(ctx context.Context, m expiration.Member) error {
	joined, err := k.rooms.Joined(ctx, m.RoomID, m.UserID)
	switch {
	case err != nil:
		return fmt.Errorf("looking at a membership: %w", err)
	case !joined:
		return ErrNotJoined
	}
	return nil
}

// MemberLeft notes that a user is no longer joined to a room, and must be removed from its calls. That is durable when it returns nil.
// Most of those who leave a room had no token. Reading that is cheaper than a write, and who gets one meanwhile is looked at by Remember.
func (k *Keeper) MemberLeft(ctx context.Context, roomID, userID string) error {
	if members, err := k.store.MembersOf(ctx, roomID, userID); err == nil && len(members) == 0 {
		return nil
	}
	if err := k.store.MarkLeaving(ctx, roomID, userID); err != nil {
		return fmt.Errorf("noting that a participant must be removed: %w", err)
	}
	signal(k.remover)
	return nil
}

// joinedWithMu notes that a participant has connected, so that its membership is looked at.
func (k *Keeper) joinedWithMu(p livekit.Participant) {
	if len(k.joined) < maxJoined {
		k.joined[p] = struct{}{}
		signal(k.remover)
	}
}

// checkWithMu has the membership of those looked at who are in a room for the first time, or for a day, because the webhook may have been
// lost.
func (k *Keeper) checkWithMu(c *call, sessions []livekit.Session) {
	if time.Since(c.checkedAt) > rememberInterval {
		c.checked, c.checkedAt = nil, time.Now()
	}
	checked := make(map[string]struct{}, len(sessions))
	for _, s := range sessions {
		if _, ok := c.checked[s.SID]; !ok {
			k.joinedWithMu(livekit.Participant{Room: c.name, Identity: s.Identity})
		}
		checked[s.SID] = struct{}{}
	}
	c.checked = checked
}

// remove removes participants until the keeper stops.
func (k *Keeper) remove() {
	removed := map[expiration.Member]removal{}
	var pruned time.Time
	for failures := 0; k.ctx.Err() == nil; {
		pause := removeInterval
		err := errors.Join(k.checkJoined(), k.removeLeaving(removed))
		if time.Since(pruned) >= pruneInterval {
			failed := k.store.Prune(k.ctx, k.wall().Add(-rememberedFor))
			if failed == nil {
				pruned = time.Now()
			}
			err = errors.Join(err, failed)
		}
		switch {
		case err == nil:
			failures = 0
		case k.ctx.Err() == nil:
			if failures == 0 {
				k.log.WithError(err).Warn("Removing participants from LiveKit failed, and is repeated")
			}
			k.metrics.failures.WithLabelValues("remove").Inc()
			pause = retryAfter(failures)
			failures++
		}
		select {
		case <-k.ctx.Done():
		case <-k.remover:
		case <-time.After(pause):
		}
	}
}

// checkJoined looks at the membership of the participants who have connected. After some errors the others wait for the next time.
func (k *Keeper) checkJoined() (failed error) {
	k.mu.Lock()
	joined := k.joined
	k.joined = map[livekit.Participant]struct{}{}
	k.mu.Unlock()
	failures := 0
	for p := range joined {
		err := errPanic
		if failures < maxFailures {
			guard.Run("looking at a participant", func() { err = k.checkMember(p) })
		}
		if err == nil {
			continue
		}
		if failures++; failures <= maxFailures {
			failed = err
		}
		k.mu.Lock()
		k.joined[p] = struct{}{}
		k.mu.Unlock()
	}
	return failed
}

// checkMember removes a participant whose user is not joined. A participant for whom no token of ours was made is somebody else's.
func (k *Keeper) checkMember(p livekit.Participant) error {
	ctx, cancel := context.WithTimeout(k.ctx, removeTimeout)
	defer cancel()
	m, err := k.store.MemberAt(ctx, p.Room, p.Identity)
	switch {
	case errors.Is(err, expiration.ErrNotFound):
		return nil
	case err != nil:
		return fmt.Errorf("looking up a participant: %w", err)
	}
	err = k.mustBeJoined(ctx, m)
	switch {
	case errors.Is(err, ErrNotJoined):
		return errors.Join(k.stillLeaves(ctx, m), k.removeParticipant(ctx, p))
	case err != nil || !m.Leaving && k.wall().Sub(m.Made) < rememberInterval:
		return err
	}
	return k.remember(ctx, m)
}

// stillLeaves notes that a member who is not joined was heard of at LiveKit, which then has given it a new token. So it is removed for a while
// again, and remembered longer.
func (k *Keeper) stillLeaves(ctx context.Context, m expiration.Member) error {
	m.Made = k.wall().Truncate(time.Millisecond)
	if err := k.store.Remember(ctx, m); err != nil {
		return fmt.Errorf("remembering a participant: %w", err)
	}
	return k.MemberLeft(ctx, m.RoomID, m.UserID)
}

// removal is when this process has removed a leaving member, for the first and the last time, and when it has last tried to.
type removal struct{ first, last, tried time.Time }

// removeLeaving removes the participants whose users have left: those first that were not tried yet, or not for the longest time, and
// otherwise in a random order, so that none of them blocks the others. It stops after some errors, because LiveKit does not answer then.
func (k *Keeper) removeLeaving(removed map[expiration.Member]removal) (failed error) {
	leaving, err := k.store.Leaving(k.ctx)
	if err != nil {
		return fmt.Errorf("reading who must be removed: %w", err)
	}
	rand.Shuffle(len(leaving), func(i, j int) { leaving[i], leaving[j] = leaving[j], leaving[i] })
	slices.SortStableFunc(leaving, func(a, b expiration.Member) int { return removed[a].tried.Compare(removed[b].tried) })
	still := make(map[expiration.Member]struct{}, len(leaving))
	for _, m := range leaving {
		still[m] = struct{}{}
	}
	maps.DeleteFunc(removed, func(m expiration.Member, _ removal) bool { _, is := still[m]; return !is })
	failures, tried := 0, 0
	for _, m := range leaving {
		was, again := removed[m]
		again = again && !was.first.IsZero()
		late := again && time.Since(was.first) > tokenLife
		if again && time.Since(was.last) < removeInterval || late && k.wall().Sub(m.Made) < rememberedFor {
			continue
		}
		if tried == maxRemovals { // others may have left meanwhile, who come first
			signal(k.remover)
			break
		}
		tried++
		err := errPanic
		guard.Run("removing a participant", func() { err = k.removeMember(m, late) })
		was.tried = time.Now()
		if err == nil {
			was.last = was.tried
			if !again {
				was.first = was.tried
			}
		}
		removed[m] = was
		if err != nil {
			failed = err
			if failures++; failures == maxFailures {
				break
			}
		}
	}
	return failed
}

// removeMember removes a leaving member, for the last time or not, unless the user has joined the room again.
func (k *Keeper) removeMember(m expiration.Member, last bool) error {
	ctx, cancel := context.WithTimeout(k.ctx, removeTimeout)
	defer cancel()
	err := k.mustBeJoined(ctx, m)
	switch {
	case err == nil:
		return k.remember(ctx, m)
	case !errors.Is(err, ErrNotJoined):
		return err
	}
	if err = k.removeParticipant(ctx, livekit.Participant{Room: m.Room, Identity: m.Identity}); err != nil || !last {
		return err
	}
	if err = k.store.Forget(ctx, m); err != nil {
		return fmt.Errorf("forgetting a participant: %w", err)
	}
	return nil
}

func (k *Keeper) removeParticipant(ctx context.Context, p livekit.Participant) error {
	err := k.sfu.Remove(ctx, p)
	switch {
	case err == nil:
		k.metrics.removed.Inc()
	case !errors.Is(err, livekit.ErrNotFound):
		return fmt.Errorf("removing a participant: %w", err)
	}
	return nil
}

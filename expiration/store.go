package expiration

import (
	"context"
	"time"
)

// TokenHash is the SHA-256 of a refresh token or a delay ID. No other form of it is stored.
type TokenHash [32]byte

// Timer is one row of the store. An expiring event has one until the room has its closing event, a delayed event until the room has the
// event itself.
type Timer struct {
	// NID is the row's number. It is positive and unique among the existing rows.
	NID       int64
	Event     Event
	TokenHash TokenHash // of the refresh token, or of the delay ID
	// Delayed is nil for an expiring event.
	Delayed  *Delayed
	Duration time.Duration
	// Received is when the event was accepted, and Deadline when the timer expires. Both have whole milliseconds.
	Received time.Time
	Deadline time.Time
	// Claim is nil while the timer runs.
	Claim *Claim
}

// Refresh sets the new deadline of a running timer.
type Refresh struct {
	NID      int64 // of the timer
	Duration time.Duration
	Deadline time.Time
}

// ConditionalClaim is a claim that succeeds only if the timer is running and has exactly this deadline.
type ConditionalClaim struct {
	NID      int64 // of the timer
	Deadline time.Time
	Claim
}

// Store keeps timers durably. A call that returned nil survives a crash of the process, and a power failure as far as the database does.
// After an error the write may have happened or not. Times have whole milliseconds. A call for several timers is one commit, and does not
// contain a timer twice.
//
// storage/suite_test.go is the suite that every implementation passes.
type Store interface {
	// Insert adds a running timer, and the digest that Index returns. It fails if the event already has a timer.
	Insert(ctx context.Context, t Timer, d Digest) error
	// Refresh sets duration and deadline of running timers. It reports for each refresh whether the timer was running.
	Refresh(ctx context.Context, refreshes []Refresh) ([]bool, error)
	// Claim claims running timers. It reports for each claim whether its condition held.
	Claim(ctx context.Context, claims []ConditionalClaim) ([]bool, error)
	// Doubt removes the digests of timers. The next start asks, for each timer without a digest, whether its event was replaced.
	Doubt(ctx context.Context, nids []int64) error
	// Drop removes those of the timers that are not claimed. A timer that is removed, by Drop, Delete or Finalise, takes its delegation along.
	Drop(ctx context.Context, nids []int64) error
	// Delete removes timers, claimed or not.
	Delete(ctx context.Context, nids []int64) error
	// Finalise replaces the row of a delayed event by its result, and reports whether the row existed. If running is set, a claimed row
	// does not count. Of each sender's finalised events the latest keep are kept.
	Finalise(ctx context.Context, nid int64, f Final, running bool, keep int) (bool, error)
	// Finalised returns a delayed event by the hash of its delay ID, or ErrNotFound.
	Finalised(ctx context.Context, h TokenHash) (DelayedEvent, error)
	// FinalisedAs returns, by event ID, the row IDs of those events that the sender sent as delayed events. If several rows have one event,
	// that is the row that was finalised first.
	FinalisedAs(ctx context.Context, sender string, eventIDs []string) (map[string]string, error)
	// FinalisedSenders returns the users who have finalised events that were sent.
	FinalisedSenders(ctx context.Context) ([]string, error)
	// Requested returns the ID of the row that a request created, finalised or not, or ErrNotFound.
	Requested(ctx context.Context, h RequestHash) (rowID string, err error)
	// Prune deletes the events that were finalised before a time, and Erase all finalised events of a sender.
	Prune(ctx context.Context, before time.Time) error
	Erase(ctx context.Context, sender string) error
	// Delegate stores the delegation of a running timer, in place of an earlier one of the same timer, and deletes that of another timer with
	// the same member key. It reports whether the timer was running; otherwise it changes nothing. Nobody else may write to the timer
	// meanwhile. UserID, RoomID, Duration and Hash are not stored, because they are in the timer's row.
	Delegate(ctx context.Context, d Delegation) (bool, error)
	// NoteSessions changes delegations in one commit. A timer without one is left out.
	NoteSessions(ctx context.Context, notes []SessionNote) error
	// Delegations returns the delegations of running timers, in any order.
	Delegations(ctx context.Context) ([]Delegation, error)
	// Read returns the timers, and nil for each that does not exist.
	Read(ctx context.Context, nids []int64) ([]*Timer, error)
	// Index calls f for every timer, in any order. It stops at the first error of f, and returns that.
	Index(ctx context.Context, f func(Indexed) error) error
	// Ping returns an error unless timers can be read and written now.
	Ping(ctx context.Context) error
}

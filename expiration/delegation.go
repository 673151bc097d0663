package expiration

import "time"

// Kept names a timer that somebody else keeps alive, without its token: only the hash of that is stored.
type Kept struct {
	Hash TokenHash // of the refresh token, or of the delay ID
	// Delayed says that the timer is that of a delayed event.
	Delayed bool
}

// Delegation is a timer that a participant's connection to the SFU keeps alive, in place of the client. A timer has one at most, which is
// deleted with the timer's row, whatever the reason.
type Delegation struct {
	// NID is the number of the timer's row.
	NID int64
	Kept
	// These are the timer's: its event's sender and room, and its duration.
	UserID, RoomID string
	Duration       time.Duration
	// MemberKey identifies the member whose leave event it is. Of the delegations of one member, the newest counts. It is zero if the timer
	// alone identifies the delegation.
	MemberKey [32]byte
	// Room and Identity name the participant at the SFU.
	Room, Identity string
	// Taken is when the delegation was accepted, and Seen when the SFU last said that the participant is there, or zero. Both have whole
	// milliseconds.
	Taken, Seen time.Time
	// RoomSID is the number of the SFU's room in which the participant was seen. A room that was made again has another one.
	RoomSID string
	Phase   DelegationPhase
}

// DelegationPhase is where a delegation is in its life.
type DelegationPhase string

const (
	// DelegationWaiting: the participant was not there yet.
	DelegationWaiting DelegationPhase = "waiting"
	// DelegationConnected: the participant was there.
	DelegationConnected DelegationPhase = "connected"
	// DelegationGone: the participant is gone, so the timer must end and must not be refreshed again.
	DelegationGone DelegationPhase = "gone"
)

// SessionNote is what changes in the delegation of a timer while the SFU is watched.
type SessionNote struct {
	NID     int64 // of the timer
	Seen    time.Time
	RoomSID string
	Phase   DelegationPhase
}

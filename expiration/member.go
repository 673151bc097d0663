package expiration

import "time"

// Member is a user for whom this server made a token of the SFU. The engine does not use it. It is stored beside the timers, because whom
// the SFU must put out has to survive a crash too.
type Member struct {
	// Room and Identity name the participant at the SFU.
	Room, Identity string
	// RoomID and UserID are those of Matrix.
	RoomID, UserID string
	// Made is when the last token was made, in whole milliseconds.
	Made time.Time
	// Leaving says that the user has left the room, and that the SFU has not been told yet.
	Leaving bool
}

// Package failpoint names the places at which a test can make the server crash, fail or wait.
//
// In a server that is built as usual all of it is empty and is compiled away. With the build tag "failpoints" each place
// looks into the file that the environment variable [File] names, which the test writes while the server runs. A line
// of it is a [Point] and what happens there:
//
//	after-claim kill 3          the process ends itself with SIGKILL when it comes there for the third time
//	before-input kill 3 5ms     the same, 5 ms later; the goroutine goes on meanwhile
//	before-input fail           Fail returns an error, for as long as the line stands
//	stream hold                 the goroutine waits, for as long as the line stands
//	before-refresh panic        the goroutine panics
//	wall-clock step -1h         the wall clock is set back, for as long as the line stands
package failpoint

// File is the environment variable with the name of the file that says what happens where.
const File = "DENDRITE_FAILPOINTS"

// Point is a place in the life of an expiring event.
type Point string

// The places, in the order in which an event comes to them.
const (
	// BeforeInsert and AfterInsert: its row is written.
	BeforeInsert Point = "before-insert"
	AfterInsert  Point = "after-insert"
	// AfterDoubt: it is written down that an event may be replaced by the one that comes.
	AfterDoubt Point = "after-doubt"
	// BeforeInput and AfterInput: the roomserver gets an event, whichever it is, and has answered.
	BeforeInput Point = "before-input"
	AfterInput  Point = "after-input"
	// BeforeAnswer: the send of an event, expiring or not, is done, and the client not yet told.
	BeforeAnswer Point = "before-answer"
	// BeforeRefresh and AfterRefresh: a new deadline is written.
	BeforeRefresh Point = "before-refresh"
	AfterRefresh  Point = "after-refresh"
	// BeforeDrop: the timer is stopped in memory, and its row still there.
	BeforeDrop Point = "before-drop"
	// BeforeClaim and AfterClaim: outcome and closing event are written.
	BeforeClaim Point = "before-claim"
	AfterClaim  Point = "after-claim"
	// AfterClosing: the roomserver has the closing event, and the row is still there.
	AfterClosing Point = "after-closing"
	// AfterDelete: the row is gone.
	AfterDelete Point = "after-delete"
	// AfterLoad: a new process has read the timers, and nothing else has happened.
	AfterLoad Point = "after-load"
	// BeforeResubmit: a closing event that was claimed before is about to be given to the roomserver again.
	BeforeResubmit Point = "before-resubmit"
	// BeforeConfirm and AfterConfirm: an event of an earlier process is made sure to be in its room.
	BeforeConfirm Point = "before-confirm"
	AfterConfirm  Point = "after-confirm"
	// Awaiting: an event is to be closed that may not be the current state because a crash set it back; whoever is told to fail has
	// waited long enough for it.
	Awaiting Point = "awaiting"
	// Wall: WallClock is read.
	Wall Point = "wall-clock"
	// Stream: messages of the output stream have come, and nothing is done with them yet.
	Stream Point = "stream"
)

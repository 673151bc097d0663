// Package failpoint names the places at which a test can make the server crash, fail or wait.
//
// In a normal build its functions do nothing, and are compiled away. With the build tag "failpoints", each place reads the file that the
// environment variable [File] names, and which the test writes while the server runs. Each line is a [Point] and what happens there:
//
//	after-claim kill 3          the process ends itself with SIGKILL when it gets there for the third time
//	before-input kill 3 5ms     the same, 5 ms later; the goroutine goes on meanwhile
//	before-input fail           Fail returns an error, as long as the line is there
//	stream hold                 the goroutine waits, as long as the line is there
//	before-refresh panic        the goroutine panics
//	wall-clock step -1h         the wall clock is set back, as long as the line is there
package failpoint

// File is the environment variable that names the file which the points read.
const File = "DENDRITE_FAILPOINTS"

// Point is a place in the life of a timer's event.
type Point string

// The points, in the order in which an event passes them.
const (
	// BeforeInsert and AfterInsert: the timer's row is inserted.
	BeforeInsert Point = "before-insert"
	AfterInsert  Point = "after-insert"
	// AfterDoubt: a timer is marked as maybe replaced by the state event that is sent now.
	AfterDoubt Point = "after-doubt"
	// BeforeInput and AfterInput: the roomserver gets any event, and has answered.
	BeforeInput Point = "before-input"
	AfterInput  Point = "after-input"
	// BeforeAnswer: the send of any event is done, and the client has no answer yet.
	BeforeAnswer Point = "before-answer"
	// BeforeRefresh and AfterRefresh: a new deadline is written.
	BeforeRefresh Point = "before-refresh"
	AfterRefresh  Point = "after-refresh"
	// BeforeDelegation and AfterDelegation: the delegation of a timer is written.
	BeforeDelegation Point = "before-delegation"
	AfterDelegation  Point = "after-delegation"
	// BeforeSession: what was seen of a participant is written.
	BeforeSession Point = "before-session"
	// BeforeDrop: the timer is stopped in memory, and its row is still there.
	BeforeDrop Point = "before-drop"
	// BeforeClaim and AfterClaim: outcome and event are written.
	BeforeClaim Point = "before-claim"
	AfterClaim  Point = "after-claim"
	// AfterClosing: the roomserver has the event, and the row is still there.
	AfterClosing Point = "after-closing"
	// AfterDelete: the row is deleted.
	AfterDelete Point = "after-delete"
	// AfterLoad: a new process has loaded the timers, and done nothing else.
	AfterLoad Point = "after-load"
	// BeforeResubmit: an event that was claimed earlier is about to be given to the roomserver again.
	BeforeResubmit Point = "before-resubmit"
	// BeforeConfirm and AfterConfirm: the roomserver is asked whether an earlier process's event is in its room.
	BeforeConfirm Point = "before-confirm"
	AfterConfirm  Point = "after-confirm"
	// Awaiting: the engine checks whether it has waited long enough for an event that a crash has set back. On failure it has.
	Awaiting Point = "awaiting"
	// Wall: WallClock is read.
	Wall Point = "wall-clock"
	// Stream: messages of the output stream have arrived, and are not processed yet.
	Stream Point = "stream"
)

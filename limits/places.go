package limits

import (
	"context"
	"sync"
	"time"

	userapi "github.com/matrix-org/dendrite/userapi/api"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/keylock"
)

const (
	// placesOfUser is how many costly requests of a user run at a time. With one, a user who sends twice a second while the server is busy
	// would wait for its own requests, and fall further and further behind.
	placesOfUser = 2
	// placeTime is how long a request keeps its place. One that takes longer may hang, and must not keep the user's other requests waiting.
	placeTime = 3 * time.Second
	// maxWaiting is how many requests of a user may have a place or wait for one. Those that wait keep their bodies.
	maxWaiting = 64
)

// ErrCrowded: as many requests of the user as may wait do so.
var ErrCrowded = keylock.ErrCrowded

// Places limits how many costly requests of a user run at a time. The others wait. Without such a limit, the requests of a few users on many
// connections take the CPU time and the database connections that closing events need, although each request is within its rate.
type Places struct{ locks *keylock.Locks[string] } // by user ID

// NewPlaces returns places that nobody has taken.
func NewPlaces() *Places { return &Places{keylock.WithPlaces[string](placesOfUser, maxWaiting)} }

// Enter waits for one of the user's places. The request's body must have been read: only then does net/http notice that a client hangs up, and a slow
// client must not keep a place. Requests of application services do not wait. leave may be called more than once. The error is ErrCrowded or
// the context's.
func (p *Places) Enter(ctx context.Context, device *userapi.Device) (leave func(), err error) {
	if device.AccountType == userapi.AccountTypeAppService {
		return func() {}, nil
	}
	unlock, err := p.locks.Lock(ctx, device.UserID)
	if err != nil {
		return nil, err
	}
	unlock = sync.OnceFunc(unlock)
	overdue := time.AfterFunc(placeTime, unlock)
	return func() { overdue.Stop(); unlock() }, nil
}

package limits

import (
	"context"
	"sync"
	"time"

	userapi "github.com/matrix-org/dendrite/userapi/api"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/keylock"
)

// placeTime is how long a request keeps its place. One that takes longer may hang, and must not keep the user's other requests waiting.
const placeTime = 3 * time.Second

// Places gives each user one place, so that the costly requests of a user run one after the other. Otherwise the requests of a few users on
// many connections take the CPU time and the database connections that closing events need, although each request is within its rate.
type Places struct{ locks *keylock.Locks[string] } // by user ID

// NewPlaces returns places that nobody has taken.
func NewPlaces() *Places { return &Places{keylock.New[string]()} }

// Enter waits for the user's place. It must be called before the request's body is read, so that waiting requests need little memory.
// Requests of application services do not wait. leave may be called more than once. The error is the context's.
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

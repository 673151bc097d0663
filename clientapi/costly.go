package clientapi

import (
	"errors"
	"net/http"
	"sync"
	"time"

	userapi "github.com/matrix-org/dendrite/userapi/api"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/keylock"
)

// maxWaiting is how many costly requests of a user may wait, or be dealt with.
const maxWaiting = 16

// begin is called for each request that schedules a delayed event, or looks some up: each of them is worth more to the server than it
// costs the client. A user's are dealt with one after the other, so that many at once take no more of memory and processors than one
// does, and those that are too many are refused with a *rateError. An application service's are neither. done may be called more than
// once.
func (a *API) begin(req *http.Request, device *userapi.Device) (done func(), err error) {
	if device.AccountType == userapi.AccountTypeAppService {
		return func() {}, nil
	}
	if wait := a.users.Wait(device.UserID, time.Now()); wait > 0 {
		return nil, &rateError{retryAfter: wait}
	}
	switch done, err = a.costly.Lock(req.Context(), device.UserID); {
	case errors.Is(err, keylock.ErrCrowded):
		return nil, &rateError{retryAfter: time.Second}
	case err != nil:
		return nil, err
	}
	return sync.OnceFunc(done), nil
}

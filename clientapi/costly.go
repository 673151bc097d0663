package clientapi

import (
	"net/http"
	"time"

	userapi "github.com/matrix-org/dendrite/userapi/api"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/limits"
)

// enter admits a request that costs the server more than the client. The request waits for one of its user's places, and is then refused
// with a *rateError if it is above the limit. leave may be called more than once.
func (a *API) enter(req *http.Request, device *userapi.Device, limit *limits.Limiter[string]) (leave func(), err error) {
	if leave, err = a.places.Enter(req.Context(), device); err != nil {
		return nil, err
	}
	if err = mayRequest(limit, device); err != nil {
		leave()
		return nil, err
	}
	return leave, nil
}

// mayRequest counts a request of a user, and returns a *rateError if it is above the limit. Application services are exempt.
func mayRequest(users *limits.Limiter[string], device *userapi.Device) error {
	if device.AccountType == userapi.AccountTypeAppService {
		return nil
	}
	return limited(users.Wait(device.UserID, time.Now()))
}

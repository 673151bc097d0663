package userapi

import (
	"cmp"
	"context"
	"fmt"

	"github.com/matrix-org/dendrite/userapi/api"
	"github.com/sirupsen/logrus"
)

// API wraps Dendrite's user API. Dendrite's client API must get it in place of Dendrite's own. Otherwise the events of a deactivated
// account stay scheduled until they are due. They are not sent then either, see [Accounts].
type API struct {
	api.UserInternalAPI
	accounts  *Accounts
	cancelAll func(ctx context.Context, userID string) error
}

// New returns a wrapper of Dendrite's user API. cancelAll cancels all delayed events of a user, and waits for those that are being sent.
func New(inner api.UserInternalAPI, accounts *Accounts, cancelAll func(ctx context.Context, userID string) error) *API {
	return &API{UserInternalAPI: inner, accounts: accounts, cancelAll: cancelAll}
}

// PerformAccountDeactivation implements api.ClientUserAPI. It cancels the user's delayed events first. If our database fails, the request
// then fails before anything has changed, and the user can still log in to repeat it.
//
// During the call the account counts as deactivated. Otherwise a join could be sent that is due after Dendrite has taken the user out of
// the rooms and before it has marked the account.
func (a *API) PerformAccountDeactivation(
	ctx context.Context, req *api.PerformAccountDeactivationRequest, res *api.PerformAccountDeactivationResponse,
) error {
	userID := fmt.Sprintf("@%s:%s", req.Localpart, cmp.Or(req.ServerName, a.accounts.serverName))
	// A client that hangs up must not leave an account half deactivated.
	ctx = context.WithoutCancel(ctx)
	defer a.accounts.end(userID)()
	if err := a.cancelAll(ctx, userID); err != nil {
		return err
	}
	if err := a.UserInternalAPI.PerformAccountDeactivation(ctx, req, res); err != nil {
		return err
	}
	// A request whose access token was checked earlier can have scheduled more events. They would not be sent, but their content would stay
	// until then. The user cannot log in any more to repeat the request, so an error does not fail it.
	if err := a.cancelAll(ctx, userID); err != nil {
		logrus.WithError(err).WithField("user_id", userID).Error("Failed to cancel what a deactivated account has scheduled, will do so when it is due")
	}
	return nil
}

package msc4140

import (
	"context"
	"errors"
	"fmt"

	dendriteconfig "github.com/matrix-org/dendrite/setup/config"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/config"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/rtc"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/rtc/keeper"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/rtc/livekit"
)

// backend is the call backend: what a server has that makes the tokens of its LiveKit itself.
type backend struct {
	check  *rtc.Check
	keeper *keeper.Keeper
	tokens *rtc.Tokens
}

// newBackend returns the backend for one LiveKit. cfg, global and rooms are for its tokens.
func newBackend(l *config.LiveKit, cfg rtc.TokenConfig, global *dendriteconfig.Global, timers keeper.Timers, store keeper.Store, rooms rtc.Rooms) *backend {
	sfu := livekit.New(livekit.Config{APIURL: l.APIURL, Key: l.APIKey, Secret: l.APISecret})
	k := keeper.New(sfu, timers, store, rooms)
	return &backend{
		check:  rtc.NewCheck(rtc.CheckConfig{APIURL: l.APIURL, Insecure: l.Insecure()}, sfu),
		keeper: k,
		tokens: rtc.NewTokens(cfg, global, rtc.Parts{
			SFU: sfu, Rooms: rooms, Participants: kept{k}, Delegations: kept{k}, TokenDelegations: kept{k}, Hints: k,
		}),
	}
}

// start takes up what earlier processes accepted. The timers must have been started.
func (b *backend) start(ctx context.Context) error {
	if err := b.keeper.Start(ctx); err != nil {
		return fmt.Errorf("failed to take up the timers of calls: %w", err)
	}
	b.check.Start(ctx)
	return nil
}

// stop may be called twice, and without start.
func (b *backend) stop() {
	b.check.Stop()
	b.keeper.Stop()
}

// degraded says what keeps calls from working.
func (b *backend) degraded() []string { return append(b.check.Degraded(), b.keeper.Warnings()...) }

// kept is the keeper as package rtc asks for it, with the errors of that package.
type kept struct{ *keeper.Keeper }

func (k kept) Remember(ctx context.Context, p rtc.Participant) error {
	return errorOfCalls(k.Keeper.Remember(ctx, expiration.Member{
		Room: p.Room, Identity: p.Identity, RoomID: p.RoomID, UserID: p.UserID,
	}))
}

func (k kept) DelegateLeave(ctx context.Context, l rtc.Leave) error {
	err := errorOfCalls(k.Keeper.DelegateLeave(ctx, keeper.Leave(l)))
	if errors.Is(err, expiration.ErrNotFound) {
		return rtc.ErrNotScheduled
	}
	return err
}

func (k kept) DelegateToken(ctx context.Context, token [32]byte, participant func(userID, roomID string) (livekit.Participant, error)) error {
	return errorOfCalls(k.Keeper.DelegateToken(ctx, token, participant))
}

// errorOfCalls returns the error of package rtc that means the same.
func errorOfCalls(err error) error {
	for own, theirs := range map[error]error{
		keeper.ErrNotJoined: rtc.ErrNotJoined, keeper.ErrTooMany: rtc.ErrTooMany, keeper.ErrCrowded: rtc.ErrCrowded,
		keeper.ErrTooShort: rtc.ErrTooShort,
	} {
		if errors.Is(err, own) {
			return theirs
		}
	}
	return err
}

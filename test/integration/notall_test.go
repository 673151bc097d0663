//go:build !all

package integration

const leftOut = "Only the rules of the contract. Crashes, outages, races, federation, abuse, clients and installations: go run ./test/all."

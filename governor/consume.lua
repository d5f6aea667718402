-- Consumes one permit, or says why not. A script is one step for Redis: of all who ask, at most one is granted.
-- KEYS  permit, state, block record, emergency brake
-- ARGV  plan_id, symbol ('' for any), 'consume' or 'peek'
-- Reply {'granted', the permit as stored} or {'denied', reason}
-- Uses GET, EXISTS, TIME, and DEL on the permit only. Every check comes before the DEL.

-- A value that is no string reads as '' and so as unreadable; any other error (ACL, memory) ends the script.
local function read(key)
  local value = redis.pcall('GET', key)
  if type(value) ~= 'table' then return value end
  local message = tostring(value.err)
  if string.find(message, 'WRONGTYPE', 1, true) then return '' end
  error(message)
end

local function is_json_number(token)
  local whole, rest = string.match(token, '^%-?(%d+)(.*)$')
  if not whole or string.match(whole, '^0%d') then return false end
  rest = string.gsub(rest, '^%.%d+', '')
  rest = string.gsub(rest, '^[eE][+-]?%d%d?%d?$', '')
  return rest == ''
end

-- cjson also takes NaN, Infinity, 0x10 and 007. A permit must not be deleted and then turn out unreadable for its
-- caller, so what stands outside of strings is held to JSON's own grammar (and to exponents of three digits).
local function has_json_literals(text)
  local bare = string.gsub(string.gsub(text, '\\.', ''), '"[^"]*"', '')
  for token in string.gmatch(bare, '[^%s{}%[%]:,]+') do
    local word = token == 'true' or token == 'false' or token == 'null'
    if not word and not is_json_number(token) then return false end
  end
  return true
end

local function object(text)
  local ok, value = pcall(cjson.decode, text)
  if ok and type(value) == 'table' and has_json_literals(text) then return value end
  return nil
end

local function is_amount(value)
  return type(value) == 'number' and value >= 0 and value < math.huge
end

-- Below 2^53: from there on doubles do not tell neighbouring whole numbers apart.
local function is_whole(value)
  return is_amount(value) and value < 9007199254740992 and value % 1 == 0
end

local function is_permit(permit)
  return type(permit.granted) == 'boolean' and type(permit.consumed) == 'boolean'
    and type(permit.symbol) == 'string' and type(permit.decision) == 'string'
    and is_amount(permit.computed_qty) and is_amount(permit.computed_notional)
    and is_amount(permit.created_at) and is_amount(permit.expires_at)
    and is_whole(permit.epoch) and is_whole(permit.seq)
    and permit.plan_id == ARGV[1]
end

local function block_reason(text)
  local block = object(text)
  local reason = block and block.reason
  if type(reason) ~= 'string' or reason == '' then return 'unknown' end
  return reason
end

local function denied(reason)
  return {'denied', reason}
end

-- Permits die with the disarm that the brake becomes. Until then, or where nobody makes one of it, they wait here.
if redis.call('EXISTS', KEYS[4]) == 1 then return denied('blocked:halted') end

local text = read(KEYS[1])
if not text then
  local block = read(KEYS[3])
  return denied(block and 'blocked:' .. block_reason(block) or 'no_permit')
end

local permit = object(text)
if not permit or not is_permit(permit) then return denied('malformed') end
if not permit.granted then return denied('not_granted') end
if permit.consumed then return denied('already_consumed') end
if ARGV[2] ~= '' and permit.symbol ~= ARGV[2] then return denied('wrong_symbol') end

local time = redis.call('TIME')
if tonumber(time[1]) + tonumber(time[2]) / 1000000 >= permit.expires_at then return denied('expired') end

-- Without a readable state nobody can tell that the epoch still holds. The permit stays: the state comes back.
local state = object(read(KEYS[2]) or '')
if not state or not is_whole(state.epoch) then return denied('stale_epoch') end
if state.epoch ~= permit.epoch then
  if ARGV[3] == 'consume' then redis.call('DEL', KEYS[1]) end
  return denied('stale_epoch')
end
-- A disarm always begins a newer epoch, so DISARMED here should not happen: a word not known as open is closed.
if state.state ~= 'ARMED' and state.state ~= 'THROTTLED' then return denied('stale_epoch') end

if ARGV[3] == 'consume' then redis.call('DEL', KEYS[1]) end
return {'granted', text}
